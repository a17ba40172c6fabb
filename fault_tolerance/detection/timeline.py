"""Timeline: the records of the ranks, put side by side without a common clock.

    rank 0   |mark 7  compute ....|== wait ==|   compute ..|mark 8        own time  = step - waits
    rank 1   |mark 7  compute ..............|=|  compute ..|mark 8        the culprit is the one who does not wait

Only durations on one clock are compared; what joins ranks are numbers: (group, seq) of a collective, (group, from, to,
seq) of a transfer. Clock offsets, where a one-way delay needs them, come from collectives, which end at the same moment
for everybody.

Rule of this file: pure. Records may be missing (a lapped or torn ring): a hole is counted, never taken for silence.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from parallel.record import Op, Phase, Record, Ring, State

KEPT = 12_000  # records a rank; more than any window needs
Ahead = tuple[tuple[int, int], int]  # (rank, other rank), by how many ns the other's clock is ahead


@dataclass(frozen=True, slots=True)
class StepSpan:
    """The training in one step of one rank.

    `own_s` is the time in which it waited for nobody and had a processor, `starved_s` that in which it had none because
    its machine was busy with others; `lost` records are missing.
    """

    rank: int
    step: int
    duration_s: float
    own_s: float
    lost: int
    starved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """A collective as its members saw it. `ranks` are the group's members, `came` their records."""

    group: int
    seq: int
    ranks: tuple[int, ...]
    came: Mapping[int, Record]

    @property
    def complete(self) -> bool:
        """All members came and all are done."""
        return len(self.came) == len(self.ranks) and all(r.state == State.DONE for r in self.came.values())

    @property
    def wire_s(self) -> float:
        """How long it took with everybody there: the time inside it of the rank that came last. Needs no clock."""
        return min(r.end_ns - r.call_ns for r in self.came.values()) / 1e9


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message: the sender's and the receiver's record; either may be missing."""

    source: int
    target: int
    sent: Record | None
    received: Record | None


def merge(old: Ring | None, new: Ring, *, keep: int = KEPT) -> Ring:
    """What is known of a rank after another reading of its ring, which may hold only what is new.

    A ring of another process or generation replaces the old one.
    """
    if old is None or (old.pid, old.generation) != (new.pid, new.generation) or new.head < old.head:
        return new
    first = new.records[0].ticket if new.records else new.head
    at = bisect_left(old.records, first, key=ticket_of)
    if at == len(old.records):
        return replace(new, records=(old.records + new.records)[-keep:])
    fresh = {r.ticket: r for r in old.records[at:]} | {r.ticket: r for r in new.records}
    return replace(new, records=(old.records[:at] + tuple(fresh[ticket] for ticket in sorted(fresh)))[-keep:])


def ticket_of(record: Record) -> int:
    """For bisection: records are in the order of their tickets."""
    return record.ticket


def tail_lost(ring: Ring) -> bool:
    """Whether the newest record is missing, so that nobody can tell what the rank is doing."""
    return bool(ring.head) and (not ring.records or ring.records[-1].ticket != ring.head - 1)


def spans(ring: Ring, *, since_step: int = 0) -> dict[int, StepSpan]:
    """The finished steps of a rank: what lies between a mark of phase TRAIN and the mark that follows it.

    Where a mark is missing, the steps on its two sides get half each of what they took together. The wait that another
    missing record would have told is taken from the record at the same place of other steps: give more steps than are
    asked for by `since_step`, and it is known well.
    """
    parts = list(_parts(ring.records))
    usual = _usual_waits(parts) if any(part.lost for part in parts) else {}
    waits = _union([(r.wait_ns, r.end_ns or ring.read_ns) for r in ring.records if r.wait_ns])
    out: dict[int, StepSpan] = {}
    for part in parts:
        for step in range(max(part.step, since_step), part.step + part.steps):
            share = _span(ring.rank, step, part, waits, usual)
            before = out.get(step)
            out[step] = share if before is None else _add(before, share)
    return out


Place = tuple[int, int]  # (records of a step, position in it)
JOINED = 3  # steps that may be counted together because the marks between them are lost


@dataclass(frozen=True, slots=True)
class _Part:
    """What lies between two neighbouring marks: usually one step, more where marks are lost."""

    start: Record
    stop: Record
    between: Sequence[Record]

    @property
    def step(self) -> int:
        return self.start.step

    @property
    def steps(self) -> int:
        return max(1, self.stop.step - self.start.step)

    @property
    def length(self) -> int:
        return self.stop.ticket - self.start.ticket

    @property
    def lost(self) -> int:
        return self.length - 1 - len(self.between)

    def place(self, ticket: int) -> Place:
        length = self.length // self.steps if self.length % self.steps == 0 else self.length
        return length, (ticket - self.start.ticket) % length


def _parts(records: Sequence[Record]) -> Iterator[_Part]:
    marks = [at for at, r in enumerate(records) if r.op == Op.MARK]
    for a, b in pairwise(marks):
        part = _Part(records[a], records[b], records[a + 1 : b])
        together = 0 <= part.stop.step - part.start.step <= (JOINED if part.lost else 1)
        if together and all(r.phase == Phase.TRAIN for r in (part.start, *part.between)):
            yield part


def _usual_waits(parts: Sequence[_Part]) -> dict[Place, float]:
    waits: dict[Place, list[int]] = defaultdict(list)
    for part in parts:
        for r in part.between:
            waits[part.place(r.ticket)].append(r.end_ns - r.wait_ns if r.wait_ns and r.end_ns else 0)
    return {place: statistics.median(values) for place, values in waits.items()}


def _span(
    rank: int, step: int, part: _Part, waits: Sequence[tuple[int, int]], usual: Mapping[Place, float]
) -> StepSpan:
    duration = part.stop.call_ns - part.start.call_ns
    waited = float(_covered(waits, part.start.call_ns, part.stop.call_ns))
    if part.lost:
        missing = set(range(part.start.ticket + 1, part.stop.ticket)) - {r.ticket for r in part.between}
        waited = min(duration, waited + sum(usual.get(part.place(ticket), 0.0) for ticket in missing))
    starved = min(max(0, part.stop.bytes - part.start.bytes), duration - waited)
    scale = 1e9 * part.steps
    return StepSpan(rank, step, duration / scale, (duration - waited - starved) / scale, part.lost, starved / scale)


def _add(a: StepSpan, b: StepSpan) -> StepSpan:
    return StepSpan(
        a.rank, a.step, a.duration_s + b.duration_s, a.own_s + b.own_s, a.lost + b.lost, a.starved_s + b.starved_s
    )


def meetings(rings: Mapping[int, Ring]) -> dict[tuple[int, int], Meeting]:
    """The collectives in these records by (group, seq)."""
    came: dict[tuple[int, int], dict[int, Record]] = defaultdict(dict)
    members: dict[int, tuple[int, ...]] = {}
    for rank, ring in rings.items():
        members.update({group.id: group.ranks for group in ring.groups.values()})
        for record in ring.records:
            if record.is_collective:
                came[record.group, record.seq][rank] = record
    return {key: Meeting(*key, members.get(key[0], tuple(sorted(found))), found) for key, found in came.items()}


def ahead_of_first(meeting: Meeting) -> tuple[Ahead, ...]:
    """How far the clocks of a complete meeting are ahead of the lowest rank's; empty where its members do not end it together."""
    if len(meeting.ranks) < 2 or _rooted(meeting):
        return ()
    first = min(meeting.ranks)
    end_ns = meeting.came[first].end_ns
    return tuple(((first, rank), meeting.came[rank].end_ns - end_ns) for rank in meeting.ranks)


def offsets(found: Iterable[Ahead]) -> dict[int, int]:
    """How far each rank's clock is ahead of the lowest rank's, by the medians of what meetings say."""
    differences: dict[tuple[int, int], list[int]] = defaultdict(list)
    for pair, ahead_ns in found:
        differences[pair].append(ahead_ns)
    return _spread({pair: int(statistics.median(values)) for pair, values in sorted(differences.items())})


def _spread(links: Mapping[tuple[int, int], int]) -> dict[int, int]:
    near: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (a, b), ahead in links.items():
        near[a].append((b, ahead))
        near[b].append((a, -ahead))
    if not near:
        return {}
    known, queue = {min(near): 0}, [min(near)]
    for rank in queue:
        for other, ahead in near[rank]:
            if other not in known:
                known[other] = known[rank] + ahead
                queue.append(other)
    return known


def _rooted(meeting: Meeting) -> bool:
    """Whether members may leave early, because data flow only from or to one of them."""
    return any(r.op in (Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER) for r in meeting.came.values())


def _union(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint, ascending intervals that cover the same."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(i for i in intervals if i[1] > i[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _covered(intervals: Sequence[tuple[int, int]], start: int, stop: int) -> int:
    at = max(0, bisect_left(intervals, (start, start)) - 1)
    total = 0
    for low, high in intervals[at:]:
        if low >= stop:
            break
        total += max(0, min(high, stop) - max(low, start))
    return total
