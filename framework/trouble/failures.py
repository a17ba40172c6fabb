"""Failures: how often the same step has failed, and whether it is always one machine that fails.

    once                        it is tried again with the same machines: most failures end by themselves
    twice, on one machine alone     that machine is left out
    three times                 it is the step, and no place: the run ends

A processor that computes nonsense, a device that has fallen off its bus or a full disk let the machine answer and everything
that is started there fail; a batch that no rank can bear fails wherever it goes.

Rule of this file: pure. What counts as a failure is decided elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

MAX_FAILURES = 3  # of one step, without one step of progress between
BLAMED = 2  # failures of one step on one machine alone, after which it is left out


class Failures:
    """Of a run, by the step that it stood at."""

    def __init__(self) -> None:
        self._at: defaultdict[int, list[frozenset[str]]] = defaultdict(list)

    def add(self, step: int, nodes: Iterable[str]) -> None:
        """A step has failed. `nodes`: where; nothing if that is not known."""
        self._at[step].append(frozenset(nodes))

    def times(self, step: int) -> int:
        """How often a step has failed."""
        return len(self._at[step])

    def culprit(self, step: int) -> str | None:
        """The machine on which, and on no other, the newest failures of a step have happened."""
        newest = self._at[step][-BLAMED:]
        alone = newest[0] if len(newest) == BLAMED else frozenset()
        return next(iter(alone)) if len(alone) == 1 and set(newest) == {alone} else None
