"""Hangs: from who waits for whom to who is waited for.

    rank 0  all-reduce #9 ..........      0 --> 2      2 has not come to #9
    rank 1  receive from 0 .........      1 --> 0      0 has not sent
    rank 2  (nothing open)                             the root: it waits for nobody

An edge goes from a rank that blocks in an operation to every member that has not come to it. Follow the edges: a rank
without one that is open itself is the cause (or its processor, debugger, data loader). If everybody came to an operation
and it does not end, the way between them is the cause. If the edges only go round, the ranks call their operations in
different orders.

Rule of this file: pure. It is told deadlines and does not measure time across clocks. Source: MegaScale's and C4's hang
analyses, with the edges of every axis in one graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from fault_tolerance.detection.timeline import tail_lost, ticket_of
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from parallel.record import Op, Phase, Record, Ring, State

TAIL = 2048  # records: nothing older can still be open


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that blocks in an operation, and the ranks that have not come to it (none: all came)."""

    rank: int
    record: Record
    absent: tuple[int, ...]
    present: tuple[int, ...]
    waited_s: float


def judge_deaths(rings: Mapping[int, Ring], topology: Topology) -> list[Verdict]:
    """A verdict for every rank whose process is gone, unless it said before that it was through."""
    out = []
    for rank, ring in sorted(rings.items()):
        if ring.dead and ring.phase != Phase.IDLE:
            last = ring.records[-1] if ring.records else None
            evidence = (f"process {ring.pid} is gone", f"last record: {_told(last)}")
            reason = f"rank {rank} on {topology.nodes[rank]} died in step {ring.step}"
            out.append(Verdict(Kind.CRASH, (rank,), topology.on([rank]), reason, evidence=evidence, confidence=0.99))
    return out


def judge_hangs(
    rings: Mapping[int, Ring],
    topology: Topology,
    deadline: Callable[[Record], float],
    *,
    unread: Collection[int] = (),
    done: Mapping[int, int] | None = None,
) -> list[Verdict]:
    """The cause of every wait that is over its deadline or was broken off: at most one verdict a cause.

    Ranks that are known to be dead are not named again, but they explain the waits for them. What a ring says that could not be
    read of late (`unread`) may be over: nothing that ends at such a wait is judged. `done`: the ticket of each rank up to which all is
    known to have ended well.
    """
    done = done or {}
    blocked = {rank: found for rank, ring in rings.items() if (found := blocked_in(ring, done.get(rank, -1)))}
    overdue = {rank for rank, (r, waited_s) in blocked.items() if r.state == State.FAILED or waited_s > deadline(r)}
    if not overdue:
        return []
    waits = {rank: Wait(rank, r, *_who(r, rings[rank], rings), waited_s) for rank, (r, waited_s) in blocked.items()}
    late = [waits[rank] for rank in sorted(overdue)]
    roots, ends, circle = follow(late, waits)
    known = [r for r in roots if r in rings and not rings[r].dead]
    if any(r in rings and rings[r].dead for r in roots):
        return []
    sure = [r for r in known if not tail_lost(rings[r])]
    if known or roots - set(known):
        return _absentees(sure or known, rings, late, topology, deadline, certain=bool(sure))
    if ends:
        return [_stuck_on_wire(wait, topology) for wait in ends if wait.rank not in unread]
    return [_out_of_order(circle, waits, rings, topology)] if circle else []


def blocked_in(ring: Ring, done: int = -1) -> tuple[Record, float] | None:
    """The operation a rank blocks in, its oldest open wait or else the one that threw it out, and for how many seconds; looked for
    among those after the ticket `done`.
    """
    if ring.dead:
        return None
    start = max(len(ring.records) - TAIL, bisect_right(ring.records, done, key=ticket_of))
    tail = [r for r in ring.records[max(0, start) :] if r.state is not State.DONE]
    blocked = [r for r in tail if r.open and r.wait_ns]
    failed = [r for r in tail if r.state == State.FAILED]
    if not blocked and not failed:
        return None
    record = min(blocked, key=lambda r: r.wait_ns) if blocked else failed[0]
    return record, ((record.end_ns or ring.read_ns) - (record.wait_ns or record.call_ns)) / 1e9


def follow(late: Iterable[Wait], waits: Mapping[int, Wait]) -> tuple[frozenset[int], tuple[Wait, ...], tuple[int, ...]]:
    """(ranks that are waited for and wait for nobody, waits to which all came, ranks of a circle) behind late waits."""
    roots: set[int] = set()
    ends: dict[tuple[int, int, int, int], Wait] = {}
    seen: set[int] = set()
    queue = [wait.rank for wait in late]
    while queue:
        rank = queue.pop()
        if rank in seen:
            continue
        seen.add(rank)
        wait = waits.get(rank)
        if wait is None:
            roots.add(rank)
        elif not wait.absent:
            ends.setdefault(_place(wait), wait)
        else:
            queue.extend(wait.absent)
    circle = tuple(sorted(r for r in seen if r in _behind(r, waits))) if not roots and not ends else ()
    return frozenset(roots), tuple(ends.values()), circle


def _behind(rank: int, waits: Mapping[int, Wait]) -> set[int]:
    """Everybody that a rank waits for, directly or not."""
    found: set[int] = set()
    queue = list(waits[rank].absent)
    while queue:
        other = queue.pop()
        if other not in found:
            found.add(other)
            queue.extend(waits[other].absent if other in waits else ())
    return found


def _who(record: Record, ring: Ring, rings: Mapping[int, Ring]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(absent, present) members of an operation, without the rank itself."""
    if record.op in (Op.SEND, Op.RECV):
        other = Op.RECV if record.op == Op.SEND else Op.SEND
        came = record.peer in rings and _reached(rings[record.peer], record, other, ring.rank)
        return ((), (record.peer,)) if came else ((record.peer,), ())
    if record.op == Op.RECV_ANY or record.group not in ring.groups:
        return (), ()
    others = [m for m in ring.groups[record.group].ranks if m != ring.rank]
    came_in = [m for m in others if m in rings and _reached(rings[m], record, None, None)]
    return tuple(m for m in others if m not in came_in), tuple(came_in)


def _reached(ring: Ring, record: Record, op: Op | None, peer: int | None) -> bool:
    """Whether a rank came to an operation or a later one of the same row; rows are in ascending order."""
    for other in reversed(ring.records):
        if other.group != record.group:
            continue
        if (op is None and other.is_collective) or (other.op == op and other.peer == peer):
            return other.seq >= record.seq
    return False


def _place(wait: Wait) -> tuple[int, int, int, int]:
    """The same for all who wait in one operation."""
    r = wait.record
    ends = (wait.rank, r.peer) if r.op == Op.SEND else (r.peer, wait.rank) if r.op == Op.RECV else (-1, -1)
    return r.group, r.seq, *ends


def _absentees(
    roots: list[int],
    rings: Mapping[int, Ring],
    late: list[Wait],
    topology: Topology,
    deadline: Callable[[Record], float],
    *,
    certain: bool,
) -> list[Verdict]:
    longest = max(late, key=lambda w: w.waited_s)
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(roots):
        if _long_silent(rings[rank], longest, deadline):
            by_node[topology.nodes[rank]].append(rank)
    out = []
    for node, ranks in by_node.items():
        evidence = tuple(_state_line(rings[r]) for r in ranks) + tuple(_wait_line(w) for w in late[:4])
        reason = (
            f"{_names(ranks)} on {node} did not come to {_told(longest.record)}, in which {_names([w.rank for w in late])}"
            f" waited up to {longest.waited_s:.1f} s"
        )
        if not certain:
            reason += "; the newest records are missing, so this is likely, not certain"
        sure = 0.95 if certain else 0.5
        out.append(Verdict(Kind.HANG, tuple(ranks), (node,), reason, evidence=evidence, confidence=sure))
    return out


def _long_silent(ring: Ring, longest: Wait, deadline: Callable[[Record], float]) -> bool:
    """Whether a rank has been at nothing known for long: a wait may be long because of somebody who is back already, and
    a rank that said it evaluates or compiles may keep the others waiting for that phase's patience."""
    if ring.phase not in (Phase.TRAIN, Phase.IDLE):
        return _silent_s(ring) >= deadline(longest.record._replace(phase=ring.phase))
    share = 0.25 if longest.record.state == State.FAILED else 0.8
    return _silent_s(ring) >= share * deadline(longest.record)


def _silent_s(ring: Ring) -> float:
    """Seconds since a rank last began or ended anything."""
    return (ring.read_ns - max([ring.mark_ns] + [max(r.call_ns, r.end_ns) for r in ring.records[-8:]])) / 1e9


def _stuck_on_wire(wait: Wait, topology: Topology) -> Verdict:
    record = wait.record
    if record.op in (Op.SEND, Op.RECV):
        link = (wait.rank, record.peer) if record.op == Op.SEND else (record.peer, wait.rank)
        reason = f"rank {link[0]} sent and rank {link[1]} receives, but the message does not arrive: {_told(record)}"
        return Verdict(
            Kind.LINK_HANG, link, topology.on(link), reason, link=link, evidence=(_wait_line(wait),), confidence=0.9
        )
    ranks = tuple(sorted({wait.rank, *wait.present}))
    pair = (ranks[0], ranks[1]) if len(ranks) == 2 else None
    reason = f"all of {_names(ranks)} came to {_told(record)}, and it does not end: a way between them is broken"
    return Verdict(
        Kind.LINK_HANG, ranks, topology.on(ranks), reason, link=pair, evidence=(_wait_line(wait),), confidence=0.8
    )


def _out_of_order(
    circle: tuple[int, ...], waits: Mapping[int, Wait], rings: Mapping[int, Ring], topology: Topology
) -> Verdict:
    """Blames those in the circle who do not what they did in the step before; else those who wait where few wait."""
    places = Counter(_place(waits[rank]) for rank in circle)
    usual, votes = places.most_common(1)[0]
    few = tuple(rank for rank in circle if _place(waits[rank]) != usual) if votes > len(circle) / 2 else ()
    new = tuple(rank for rank in circle if _deviates(rings[rank]))
    ranks = new if 0 < len(new) < len(circle) else few or circle
    evidence = tuple(_wait_line(waits[rank]) for rank in circle)
    reason = f"{_names(circle)} wait for each other in a circle: {_names(ranks)} called operations in another order"
    return Verdict(Kind.MISMATCH, ranks, topology.on(ranks), reason, evidence=evidence, confidence=0.9)


def _deviates(ring: Ring) -> bool:
    """Whether the operations of a rank's running step are not the first ones of its last whole step. False if unknown."""
    marks = [at for at, r in enumerate(ring.records[-TAIL:]) if r.op == Op.MARK]
    if len(marks) < 2:
        return False
    tail = ring.records[-TAIL:]
    before, now = tail[marks[-2] : marks[-1]], tail[marks[-1] :]
    if now[-1].ticket - before[0].ticket + 1 != len(before) + len(now):
        return False
    calls = [[(r.group, r.op, r.peer, r.bytes) for r in part if r.op != Op.MARK] for part in (before, now)]
    return calls[1] != calls[0][: len(calls[1])]


def _names(ranks: Iterable[int]) -> str:
    told = sorted(ranks)
    return f"rank {told[0]}" if len(told) == 1 else "ranks " + ", ".join(map(str, told))


def _told(record: Record | None) -> str:
    if record is None:
        return "nothing"
    if record.op == Op.MARK:
        return f"the mark of step {record.step}"
    peer = f" with rank {record.peer}" if record.peer >= 0 else ""
    return f"{record.op.name.lower()} #{record.seq}{peer} of {record.bytes} bytes in step {record.step}"


def _wait_line(wait: Wait) -> str:
    absent = f"for {_names(wait.absent)}" if wait.absent else "though all came"
    return f"rank {wait.rank} waited {wait.waited_s:.2f} s in {_told(wait.record)} {absent}"


def _state_line(ring: Ring) -> str:
    last = ring.records[-1] if ring.records else None
    state = {"T": "stopped", "R": "running", "S": "asleep", "D": "in disk sleep"}.get(ring.process, "of unknown state")
    return f"rank {ring.rank} is {state} in phase {ring.phase.name}, silent for {_silent_s(ring):.1f} s after {_told(last)}"
