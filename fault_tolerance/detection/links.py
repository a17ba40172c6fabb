"""Links: which way is slow, from how long messages and collectives took with everybody there.

            to 0   1   2   3
    from 0  .   1.0 2.9 1.0        one cell       that way
         1  1.0 .   1.1 0.9        a whole row    what 1 sends        (all of row 1 high)
         2  1.0 1.0 .   1.0        a whole column what 2 receives
         3  1.1 1.0 1.0 .          row and column the machine

A message's time runs from when both ends had come, on clocks that are lined up by the ends of collectives. A collective's
time is that of its last comer. Each is divided by the median of its like (same operation, same size), so what remains is
1 for a healthy way. A collective of more than two ranks names its group; a pair test then names the way.

Rule of this file: pure. Source: C4's delay matrix; thresholds 1.5 and 0.8 as in our own check of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fault_tolerance.detection.timeline import Meeting, Transfer
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from parallel.record import Phase, State

HOT = 1.5
SHARE = 0.8
LEAST_SAMPLES = 5
LEAST_S = 0.0005  # below, it is the scheduler of the machine that one sees
REALLY_WAITED_NS = 50_000

Ends = tuple[int, ...]  # (from, to) of a message, or the members of a group


@dataclass(frozen=True, slots=True)
class Delay:
    """How long something took between these ranks. `like` tells what it may be compared with."""

    ends: Ends
    like: Hashable
    seconds: float
    step: int


def delay_of_meeting(meeting: Meeting) -> Delay | None:
    """How long a collective took that is complete. None outside training."""
    any_record = meeting.came[min(meeting.came)]
    if len(meeting.ranks) < 2 or any_record.phase != Phase.TRAIN:
        return None
    like = ("collective", any_record.op, any_record.bytes, len(meeting.ranks))
    return Delay(meeting.ranks, like, meeting.wire_s, any_record.step)


def delay_of_message(transfer: Transfer, offsets: Mapping[int, int]) -> Delay | None:
    """How long a message was under way. None where that is not known, or outside training."""
    sent, received = transfer.sent, transfer.received
    if sent is None or received is None or received.state != State.DONE or received.phase != Phase.TRAIN:
        return None
    if transfer.source not in offsets or transfer.target not in offsets:
        return None
    if received.end_ns - received.wait_ns < REALLY_WAITED_NS or not received.wait_ns:
        return None  # it lay there already: nobody knows since when
    ahead = offsets[transfer.target] - offsets[transfer.source]
    start = max(sent.call_ns + ahead, received.call_ns)
    like = ("message", sent.bytes)
    return Delay((transfer.source, transfer.target), like, max(0, received.end_ns - start) / 1e9, sent.step)


def normalised(
    samples: Iterable[Delay], past: Mapping[tuple[Ends, Hashable], float] | None = None
) -> dict[Ends, tuple[float, float]]:
    """(how many times the usual, extra seconds) by ends, medians over the samples.

    The usual is the lower median over all ends with samples of the same like; where there is only one, its own `past`.
    Ends count with the quarter of their samples that is fastest, so that a few late ones, on a busy machine, are no way.
    """
    by_like: dict[Hashable, dict[Ends, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        by_like[sample.like][sample.ends].append(sample.seconds)
    ratios: dict[Ends, list[tuple[float, float]]] = defaultdict(list)
    for like, by_ends in by_like.items():
        typical = {ends: statistics.median(v) for ends, v in by_ends.items() if len(v) >= LEAST_SAMPLES}
        for ends in typical:
            seconds = _lower_quarter(by_ends[ends])
            known = (past or {}).get((ends, like))
            usual = statistics.median_low(list(typical.values())) if len(typical) > 1 else known
            if known is not None and usual is not None:
                usual = max(usual, known)
            if usual is not None and usual > 0:
                ratios[ends].append((seconds / usual, (seconds - usual) * len(by_ends[ends])))
    return {ends: max(found, key=lambda pair: pair[1]) for ends, found in ratios.items()}


def _lower_quarter(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


def could_be_slow(samples: Iterable[Delay], least_s: float) -> bool:
    """False where nothing took long enough, all samples of some ends together, for `judge_links` to find it slow by `least_s`."""
    totals: defaultdict[tuple[Ends, Hashable], float] = defaultdict(float)
    for sample in samples:
        totals[sample.ends, sample.like] += sample.seconds
    return any(total >= 0.75 * least_s for total in totals.values())  # of the lower quarter's sample, three quarters are no shorter


def levels(samples: Iterable[Delay]) -> dict[tuple[Ends, Hashable], float]:
    """The median seconds by ends and like: what `normalised` takes as the past."""
    by: dict[tuple[Ends, Hashable], list[float]] = defaultdict(list)
    for sample in samples:
        by[sample.ends, sample.like].append(sample.seconds)
    return {key: statistics.median(values) for key, values in by.items() if len(values) >= LEAST_SAMPLES}


def judge_links(
    ratios: Mapping[Ends, tuple[float, float]], topology: Topology, *, hot: float = HOT, least_s: float = LEAST_S
) -> list[Verdict]:
    """The slow cells, rows, columns or machines in normalised delays."""
    matrix: dict[tuple[int, int], float] = {}
    groups: dict[Ends, float] = {}
    for ends, (ratio, extra_s) in ratios.items():
        value = ratio if extra_s >= least_s else min(ratio, 1.0)
        if len(ends) == 2:
            matrix[ends] = max(value, matrix.get(ends, 0.0))
            if (ends[1], ends[0]) not in ratios:  # a collective of two: both directions
                matrix.setdefault((ends[1], ends[0]), value)
        else:
            groups[ends] = value
    return judge_matrix(matrix, topology, hot=hot) or _judge_groups(groups, topology, hot)


def judge_matrix(matrix: Mapping[tuple[int, int], float], topology: Topology, *, hot: float = HOT) -> list[Verdict]:
    """The matrix by ranks, put together by machines: ways inside a machine are its own matter."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (a, b), ratio in matrix.items():
        if topology.nodes[a] != topology.nodes[b]:
            cells[topology.nodes[a], topology.nodes[b]].append(ratio)
    by_node = {pair: statistics.median(values) for pair, values in cells.items()}
    high = {pair for pair, ratio in by_node.items() if ratio >= hot}
    names = sorted({name for pair in by_node for name in pair})
    rows = {n for n in names if _share(n, 0, by_node, high) >= SHARE}
    columns = {n for n in names if _share(n, 1, by_node, high) >= SHARE}
    out = []
    for name in sorted(rows | columns):
        mine = [by_node[p] for p in high if (name in rows and p[0] == name) or (name in columns and p[1] == name)]
        what = "sends and receives" if name in rows & columns else "sends" if name in rows else "receives"
        reason = f"{name} {what} {statistics.median(mine):.1f} times slower than usual, to or from {len(mine)} others"
        ranks = topology.ranks_of(name)
        out.append(_slow(ranks, (name,), None, reason, statistics.median(mine), 0.9, _lines(by_node, name)))
    explained = {p for p in high if p[0] in rows or p[1] in columns}
    for (a, b), ratio in sorted(matrix.items(), key=lambda item: -item[1]):
        pair = topology.nodes[a], topology.nodes[b]
        if ratio >= hot and pair in high - explained:
            explained |= {pair, pair[::-1]} if pair[::-1] in high else {pair}
            both = "between" if pair[::-1] in high else "from"
            reason = f"the way {both} rank {a} ({pair[0]}) and rank {b} ({pair[1]}) takes {ratio:.1f} times the usual"
            reason = reason.replace(" and ", " to ", 1) if both == "from" else reason
            out.append(_slow((a, b), topology.on((a, b)), (a, b), reason, ratio, 0.85, _lines(by_node, pair[0])))
    return out


def _share(name: str, side: int, cells: Mapping[tuple[str, str], float], high: set[tuple[str, str]]) -> float:
    """Share of a row's (side 0) or column's (side 1) used cells that are high; one cell alone is no row."""
    used = [pair for pair in cells if pair[side] == name]
    return sum(pair in high for pair in used) / len(used) if len(used) > 1 else 0.0


def _judge_groups(groups: Mapping[Ends, float], topology: Topology, hot: float) -> list[Verdict]:
    out = []
    for ranks, ratio in sorted(groups.items()):
        if ratio >= hot:
            reason = f"collectives of ranks {list(ranks)} take {ratio:.1f} times the usual; a pair test names the way"
            out.append(_slow(ranks, topology.on(ranks), None, reason, ratio, 0.5, ()))
    return out


def _slow(
    ranks: tuple[int, ...],
    nodes: tuple[str, ...],
    link: tuple[int, int] | None,
    reason: str,
    ratio: float,
    sure: float,
    evidence: tuple[str, ...],
) -> Verdict:
    return Verdict(Kind.SLOW_LINK, ranks, nodes, reason, link=link, evidence=evidence, confidence=sure, severity=ratio)


def _lines(cells: Mapping[tuple[str, str], float], name: str) -> tuple[str, ...]:
    return tuple(f"{a} -> {b}: {ratio:.2f}" for (a, b), ratio in sorted(cells.items()) if name in (a, b))[:16]
