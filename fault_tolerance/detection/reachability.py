"""Reachability: which ways between machines are dead, from what the machines saw of each other, and whom to leave out.

            to n1  n2  n3           every machine asks every other one for some bytes over TCP, and sends it small datagrams,
    from n1  .    ok  DEAD          which it counts: what n1 sends to n3 never comes, so n3's answers are never acknowledged
         n2  ok    .   ok           either, and TCP fails in both directions. The datagrams need no answer: they tell which.
         n3  ok   ok   .
                                    one cell     the way n1>n3               a whole row     what n1 sends
                                    a column     what n3 receives            row and column  the machine

A way over which TCP works is alive, whatever became of the datagrams: many networks let none through.

Rule of this file: pure. `fault_tolerance/detection/probe.py` measures. Source: C4's delay matrix, for delays without end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

from fault_tolerance.detection.links import SHARE
from fault_tolerance.detection.verdict import Kind, Topology, Verdict

EXACT_NODES = 16  # of dead ways: among more, the cover is a good one and maybe not the smallest


class Stage(StrEnum):
    """How far a question over TCP came."""

    DONE = "done"
    CONNECT = "connect"  # no connection was had
    ANSWER = "answer"  # it was, and nobody answered: a process that is busy, for the kernels did exchange packets both ways
    DATA = "data"  # a small answer came, a large one did not


@dataclass(frozen=True, slots=True)
class Way:
    """What was seen of the way from one machine to another: how far the question of the first came, how long it took or why
    it failed, and how many of its datagrams the other one counted.
    """

    stage: Stage
    seconds: float
    failure: str
    sent: int
    heard: int


@dataclass(frozen=True, slots=True)
class Dead:
    """A way over which nothing, or not enough, comes. `why` is what was seen."""

    source: str
    target: str
    why: str

    @property
    def ends(self) -> tuple[str, str]:
        """(from, to)."""
        return self.source, self.target

    def __str__(self) -> str:
        return f"way {self.source}>{self.target}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The machines to do without, and why these."""

    nodes: tuple[str, ...]
    reason: str


def dead_ways(seen: Mapping[tuple[str, str], Way]) -> tuple[Dead, ...]:
    """The dead ways. A pair of which one machine could not be asked is not judged."""
    return tuple(d for a, b in sorted(seen) if a < b and (b, a) in seen for d in _of_pair(a, b, seen[a, b], seen[b, a]))


def _of_pair(a: str, b: str, there: Way, back: Way) -> Iterator[Dead]:
    failed = [(x, y, way) for x, y, way in ((a, b, there), (b, a, back)) if way.stage in (Stage.CONNECT, Stage.DATA)]
    if len(failed) == 1:  # the other's question crossed both directions, so what fails is of one kind only
        x, y, way = failed[0]
        if way.stage is Stage.CONNECT:
            yield Dead(x, y, f"{x} cannot open a connection to {y} ({way.failure}), {y} can to {x}")
        else:
            yield Dead(y, x, f"small packets pass between {x} and {y}, large ones of {y} do not come ({way.failure})")
    elif failed:
        lost = [(x, y, way) for x, y, way in failed if not way.heard]
        for x, y, way in lost or failed:
            small = f"{way.heard} of {way.sent} small datagrams came"
            yield Dead(x, y, f"no TCP between {x} and {y} ({way.failure}), and {small} from {x} to {y}")


def judge_reach(dead: Collection[Dead], seen: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """In words: each machine that is cut off, cannot send or cannot receive, then each single way. `seen`: all ways asked."""
    asked, gone = set(seen), {d.ends for d in dead}
    nodes = sorted({node for way in gone for node in way})
    rows = {n for n in nodes if _share(n, 0, asked, gone) >= SHARE}
    columns = {n for n in nodes if _share(n, 1, asked, gone) >= SHARE}
    told = []
    for name in sorted(rows | columns):
        if name in rows & columns:
            told.append(f"node {name}: nothing passes between it and the others")
        elif name in rows:
            told.append(f"row {name}: what it sends reaches none of the others")
        else:
            told.append(f"column {name}: nothing that the others send reaches it")
    return (*told, *(f"{d}: {d.why}" for d in dead if d.source not in rows and d.target not in columns))


def _share(node: str, side: int, asked: Collection[tuple[str, str]], gone: Collection[tuple[str, str]]) -> float:
    """Share of a row's (side 0) or column's (side 1) cells that are dead; one cell alone is no row."""
    mine = [way for way in asked if way[side] == node]
    return sum(way in gone for way in mine) / len(mine) if len(mine) > 1 else 0.0


def as_verdict(dead: Sequence[Dead], seen: Collection[tuple[str, str]], topology: Topology, *, before: str = "") -> Verdict:
    """The dead ways as a verdict. `before` is what led to the question."""
    nodes = tuple(dict.fromkeys(node for d in dead for node in d.ends))
    link = None
    if len(dead) == 1 and set(nodes) <= set(topology.nodes):
        link = topology.ranks_of(dead[0].source)[0], topology.ranks_of(dead[0].target)[0]
    ranks = link or tuple(rank for node in nodes for rank in topology.ranks_of(node))
    evidence = (*(f"{d}: {d.why}" for d in dead), f"{len(set(seen)) - len(dead)} other ways are alive")
    reason = "; ".join((*judge_reach(dead, seen), *([before] if before else [])))
    return Verdict(Kind.LINK_HANG, ranks, nodes, reason, link=link, evidence=evidence, confidence=0.97)


def leave_out(dead: Collection[Dead], nodes: Sequence[str], *, seated: Collection[str] = ()) -> LeftOut:
    """The fewest machines without which none of these dead ways is left; among equals, those that do not train now, then the
    last of `nodes`, which are in order of preference: the first bears rank 0. Ways of machines that are not in `nodes` do not count.
    """
    here = [d for d in dead if set(d.ends) <= set(nodes)]
    pairs = {frozenset(d.ends) for d in here}
    if not pairs:
        return LeftOut((), "no way between the machines is known to be dead")
    place = {node: at for at, node in enumerate(nodes)}
    ends = sorted({node for pair in pairs for node in pair}, key=lambda node: (node in seated, -place[node]))
    out = _smallest(pairs, ends) if len(ends) <= EXACT_NODES else _greedy(pairs, ends)
    told = ", ".join(map(str, here[:4])) + (", ..." if len(here) > 4 else "")
    names = ", ".join(sorted(out, key=place.__getitem__))
    fewest = "the fewest machines" if len(ends) <= EXACT_NODES else "few machines"
    return LeftOut(
        tuple(sorted(out, key=place.__getitem__)),
        f"{told}: dead; {names} left out, {fewest} that cover {'it' if len(here) == 1 else 'them'}"
        f" ({len(nodes) - len(out)} of {len(nodes)} stay)",
    )


def _smallest(pairs: Collection[frozenset[str]], ends: Sequence[str]) -> tuple[str, ...]:
    """The first of the smallest covers, in the order of `ends`."""
    covers = (c for size in range(1, len(ends) + 1) for c in combinations(ends, size) if all(pair & set(c) for pair in pairs))
    return next(covers)


def _greedy(pairs: Iterable[frozenset[str]], ends: Sequence[str]) -> tuple[str, ...]:
    """Again and again the machine with the most dead ways that are left."""
    left, out = set(pairs), []
    while left:
        out.append(max(ends, key=lambda node: sum(node in pair for pair in left)))
        left = {pair for pair in left if out[-1] not in pair}
    return tuple(out)
