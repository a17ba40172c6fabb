"""Encounters: the collectives and messages of the newest steps, each put together once, as the records of its ends come in.

    records of rank 0 --+--> meeting (group, seq)    --> mismatches        of what was touched since the last look
    records of rank 1 --+--> message (from, to, seq) --> clocks, delays    noted when a meeting is over

A look that put the records at hand together (`timeline.meetings`) would do so again with most of what was in the one before, too.

Rule of this file: it remembers what was, by number and step; what follows is judged by pure functions.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from fault_tolerance.detection.links import Delay, delay_of_meeting, delay_of_message
from fault_tolerance.detection.mismatches import judge_mismatches
from fault_tolerance.detection.timeline import Ahead, Meeting, Transfer, ahead_of_first, offsets, ticket_of
from fault_tolerance.detection.verdict import Topology, Verdict
from parallel.record import Op, Record, Ring, State

MISMATCH_STEPS = 2  # a mismatch stands as long as it is no older


@dataclass(slots=True)
class _Met:
    """A collective; `came` is that of its meeting. Once all have left it, what it says of clocks and ways."""

    meeting: Meeting
    came: dict[int, Record]
    step: int
    over: int = 0
    ahead: tuple[Ahead, ...] = ()
    delay: Delay | None = None


@dataclass(slots=True)
class _Sent:
    """A message; either end's record may be missing."""

    source: int
    target: int
    step: int
    sent: Record | None = None
    received: Record | None = None

    def transfer(self) -> Transfer:
        return Transfer(self.source, self.target, self.sent, self.received)


class Encounters:
    """Of one crew. Where all of it is on one machine, what two ranks have with each other tells nothing of ways between machines:
    then clocks and messages are not looked at for that.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._apart = len(set(topology.nodes)) > 1
        self._settled: dict[int, int] = {}  # by rank: the ticket up to which nothing changes any more
        self._met: dict[tuple[int, int], _Met] = {}
        self._sent: dict[tuple[int, int, int, int], _Sent] = {}
        self._touched_met: dict[tuple[int, int], _Met] = {}
        self._touched_sent: dict[tuple[int, int, int, int], _Sent] = {}
        self._mismatched: list[Verdict] = []

    def take(self, rank: int, ring: Ring) -> None:
        """Take in what is new in a rank's ring, or may have changed since the last time."""
        settled, going_on = self._settled.get(rank, -1), True
        for record in ring.records[bisect_right(ring.records, settled, key=ticket_of) :]:
            going_on = going_on and record.state != State.CALLED
            if going_on:
                settled = record.ticket
            op = record.op
            if op == Op.MARK:
                continue
            if op == Op.SEND:
                self._message(record, rank, record.peer).sent = record
            elif op == Op.RECV:
                self._message(record, record.peer, rank).received = record
            elif op != Op.RECV_ANY:
                self._come(rank, record, ring)
        self._settled[rank] = settled

    def mismatches(self, newest: int) -> list[Verdict]:
        """The first mismatch, if there is one; `newest` is the last step that all have begun. What nobody has touched since it was
        judged is as it was.
        """
        if not self._touched_met and not self._touched_sent:
            return self._mismatched
        since = newest - MISMATCH_STEPS
        met = {key: m for key, m in self._touched_met.items() if m.step >= since}
        sent = {key: m for key, m in self._touched_sent.items() if m.step >= since}
        self._mismatched = judge_mismatches(
            (m.meeting for m in met.values()), (m.transfer() for m in sent.values()), self._topology
        )
        self._touched_met, self._touched_sent = (met, sent) if self._mismatched else ({}, {})  # what is wrong is judged again
        return self._mismatched

    def delays(self, since: int, first: int) -> list[Delay]:
        """The samples of steps from `first` on, with clocks lined up by the meetings since `since`."""
        first = max(since, first)
        out = [m.delay for m in self._met.values() if m.delay is not None and m.step >= first]
        if self._apart:
            clocks = offsets(pair for m in self._met.values() if m.step >= since for pair in m.ahead)
            messages = (delay_of_message(m.transfer(), clocks) for m in self._sent.values() if m.step >= first)
            out += [sample for sample in messages if sample is not None]
        return out

    def forget(self, before: int) -> None:
        """What was before a step is not asked for any more."""
        _drop(self._met, before)
        _drop(self._sent, before)

    def _message(self, record: Record, source: int, target: int) -> _Sent:
        key = record.group, source, target, record.seq
        message = self._sent.get(key)
        if message is None:
            message = self._sent[key] = _Sent(source, target, record.step)
        self._touched_sent[key] = message
        return message

    def _come(self, rank: int, record: Record, ring: Ring) -> None:
        key = record.group, record.seq
        met = self._met.get(key)
        if met is None:
            group, came = ring.groups.get(record.group), dict[int, Record]()
            met = self._met[key] = _Met(Meeting(*key, group.ranks if group is not None else (), came), came, record.step)
        before = met.came.get(rank)
        met.came[rank] = record
        self._touched_met[key] = met
        if record.state == State.DONE and (before is None or before.state != State.DONE):
            met.over += 1
            if met.over == len(met.meeting.ranks):
                self._is_over(met)

    def _is_over(self, met: _Met) -> None:
        if self._apart or len(met.meeting.ranks) > 2:
            met.delay = delay_of_meeting(met.meeting)
        if self._apart:
            met.ahead = ahead_of_first(met.meeting)


def _drop(known: dict[Any, Any], before: int) -> None:
    """Remove what is older, from the front on, where the oldest lie."""
    old = []
    for key, item in known.items():
        if item.step >= before:
            break
        old.append(key)
    for key in old:
        del known[key]
