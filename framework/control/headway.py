"""Headway: whether a save still gets on, by what its storage has taken so far.

    12 MB, 40 MB, 71 MB, 71 MB, 71 MB, ...      nothing for longer than one has patience: stalled

A slow storage is waited for as long as it takes something. One that is dead holds nobody up, however large the state.

Rule of this file: a value out of numbers. Who has how much patience is `durable.py`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Headway:
    """The most bytes that were ever seen to be taken, and since when there are no more (monotonic seconds)."""

    since: float
    num_bytes: int = 0

    def look(self, now: float, num_bytes: int) -> Headway:
        """After another look."""
        return Headway(now, num_bytes) if num_bytes > self.num_bytes else self

    def is_stalled(self, now: float, patience_s: float) -> bool:
        """Whether nothing was taken for too long."""
        return now - self.since > patience_s
