"""Mismatches: the same number of an operation, but not the same operation.

    group dp, #41:   rank 0 all-reduce 4096 B    rank 1 all-reduce 4096 B    rank 2 all-gather 512 B   <- 2
    group dp, #42:   rank 0 in step 7            rank 1 in step 7            rank 2 in step 8          <- 2 skipped one
    1 -> 0, #5:      1 sent 128 B                0 expects 256 B                                       <- both

Every rank notes an operation before the backend looks at it, so the evidence is there even if the backend then aborts
the process or never returns.

Rule of this file: pure. Shapes are compared only where the recorder says that they must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from fault_tolerance.detection.timeline import Meeting, Transfer
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from parallel.record import Phase, Record


def judge_mismatches(meetings: Iterable[Meeting], transfers: Iterable[Transfer], topology: Topology) -> list[Verdict]:
    """The first mismatch, if there is one: what comes after it in the same group only follows from it."""
    found = [judged for m in meetings if len(m.came) > 1 and (judged := _judge_meeting(m, topology))]
    pairs = [verdict for t in transfers if (verdict := _judge_transfer(t, topology))]
    return [min(found, key=lambda v: v[0])[1]] if found else pairs[:1]


def _judge_meeting(meeting: Meeting, topology: Topology) -> tuple[int, Verdict] | None:
    return _differ(meeting, _signature, "calls another operation", topology) or _differ(
        meeting, _when, "comes to it in another step: it skipped or repeated an operation", topology
    )


def _signature(record: Record) -> Hashable:
    alike = (record.bytes, record.dtype, record.shape) if record.shape else ()
    return record.op, record.peer, alike


def _when(record: Record) -> Hashable:
    return record.step if record.phase == Phase.TRAIN else None


def _differ(
    meeting: Meeting, aspect: Callable[[Record], Hashable], what: str, topology: Topology
) -> tuple[int, Verdict] | None:
    if len({aspect(record) for record in meeting.came.values()}) == 1:
        return None  # as nearly always
    views = {rank: aspect(record) for rank, record in sorted(meeting.came.items())}
    views = {rank: view for rank, view in views.items() if view is not None}
    counts = Counter(views.values())
    if len(counts) < 2:
        return None
    (usual, votes), (_, runner_up) = counts.most_common(2)
    undecided = votes == runner_up
    odd = tuple(rank for rank, view in views.items() if undecided or view != usual)
    told = "ranks " + ", ".join(map(str, odd)) if len(odd) > 1 else f"rank {odd[0]}"
    first = min(meeting.came.values(), key=lambda r: r.step)
    reason = f"operation #{meeting.seq} of ranks {list(meeting.ranks)} in step {first.step}: {told} {what}"
    evidence = tuple(
        f"rank {rank}: {r.op.name.lower()} of {r.bytes} bytes, type {r.dtype}, root {r.peer}, step {r.step}"
        for rank, r in sorted(meeting.came.items())
    )
    sure = 0.6 if undecided else 0.97
    return first.step, Verdict(Kind.MISMATCH, odd, topology.on(odd), reason, evidence=evidence, confidence=sure)


def _judge_transfer(transfer: Transfer, topology: Topology) -> Verdict | None:
    sent, received = transfer.sent, transfer.received
    if sent is None or received is None or (sent.bytes, sent.dtype) == (received.bytes, received.dtype):
        return None
    ranks = (transfer.source, transfer.target)
    reason = (
        f"message #{sent.seq} from rank {ranks[0]} to rank {ranks[1]}: sent {sent.bytes} bytes of type {sent.dtype}, "
        f"expected {received.bytes} of type {received.dtype}"
    )
    return Verdict(Kind.MISMATCH, ranks, topology.on(ranks), reason, link=ranks, confidence=0.9)
