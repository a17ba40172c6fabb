"""The plain way to what `Encounters` keeps: all messages, clocks and samples of the records that are at hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from fault_tolerance.detection.links import Delay, delay_of_meeting, delay_of_message
from fault_tolerance.detection.timeline import Meeting, Transfer, ahead_of_first, offsets
from parallel.record import Op, Record, Ring


def transfers(rings: Mapping[int, Ring]) -> dict[tuple[int, int, int, int], Transfer]:
    """The messages in these records by (group, source, target, seq)."""
    ends: dict[tuple[int, int, int, int], list[Record | None]] = defaultdict(lambda: [None, None])
    for rank, ring in rings.items():
        for record in ring.records:
            if record.op == Op.SEND:
                ends[record.group, rank, record.peer, record.seq][0] = record
            elif record.op == Op.RECV:
                ends[record.group, record.peer, rank, record.seq][1] = record
    return {key: Transfer(key[1], key[2], *pair) for key, pair in ends.items()}


def clock_offsets(found: Iterable[Meeting]) -> dict[int, int]:
    """How far each rank's clock is ahead of the lowest rank's, in ns, for ranks joined by finished collectives."""
    return offsets(pair for meeting in found if meeting.complete for pair in ahead_of_first(meeting))


def delays(transfers: Iterable[Transfer], meetings: Iterable[Meeting], offsets: Mapping[int, int]) -> list[Delay]:
    """The samples in these records: messages that were really waited for, and finished collectives of training."""
    found = (delay_of_message(t, offsets) for t in transfers), (delay_of_meeting(m) for m in meetings if m.complete)
    return [delay for some in found for delay in some if delay is not None]
