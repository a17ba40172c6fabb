"""Deadlines: how long an operation may take before somebody must look, learnt from the operation itself.

    deadline(group, op, size) = max(floor, 10 x p99 of what it took,  3 x the longest recent step)
    before it is learnt       = patience                 compilation, first steps, connections being made
    outside training          = patience of the phase    evaluation, checkpoints

Libraries wait 10 to 30 minutes because one number must fit every operation. A hang may stay unseen for 15 s or three
steps, so a deadline never exceeds the longer of the two once it is learnt.

Rule of this file: pure but for its own memory; seconds in, seconds out.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.record import Phase, Record, State

LEARNT = 8  # samples
KEPT = 256


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `floor_s`: never alarm earlier; the longest deadline is the longer of `ceiling_s` and `steps` step times.
    The rest: how long a rank may keep the others waiting in a phase other than training."""

    floor_s: float = 5.0
    ceiling_s: float = 12.0
    steps: float = 2.5
    unlearnt_s: float = 300.0
    start_s: float = 600.0
    evaluate_s: float = 600.0
    checkpoint_s: float = 600.0
    compile_s: float = 900.0

    def of(self, phase: Phase) -> float:
        """How long a rank may stay in a phase other than TRAIN while others wait for it."""
        return {
            Phase.START: self.start_s,
            Phase.EVALUATE: self.evaluate_s,
            Phase.SNAPSHOT: self.checkpoint_s,
            Phase.CHECKPOINT: self.checkpoint_s,
            Phase.COMPILE: self.compile_s,
        }.get(phase, 0.0)


Key = tuple[int, int, int]


class Deadlines:
    """What operations and steps took so far, and what follows."""

    def __init__(self, patience: Patience | None = None, *, warm_up_steps: int = 3) -> None:
        self.patience = patience or Patience()
        self._warm_up_steps = warm_up_steps
        self._took: defaultdict[Key, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._steps: deque[float] = deque(maxlen=32)
        self._first_step: int | None = None

    def learn(self, records: Iterable[Record]) -> None:
        """Take in finished operations of training steps; others are passed over."""
        for record in records:
            if record.state == State.DONE and record.phase == Phase.TRAIN and record.end_ns:
                self._took[_key(record)].append((record.end_ns - (record.wait_ns or record.call_ns)) / 1e9)

    def learn_step(self, step: int, duration_s: float) -> None:
        """Take in the length of a finished training step."""
        if self._first_step is None:
            self._first_step = step
        if step >= self._first_step + self._warm_up_steps:
            self._steps.append(duration_s)

    @property
    def warm(self) -> bool:
        """Whether enough steps have been seen to know what is usual."""
        return len(self._steps) >= 2

    @property
    def step_s(self) -> float:
        """The longest recent step."""
        return max(self._steps, default=0.0)

    def of(self, record: Record) -> float:
        """Seconds that a rank may wait in this operation before it is a hang."""
        patience = self.patience
        if record.phase != Phase.TRAIN:
            return max(patience.of(record.phase), patience.floor_s)
        took = self._took.get(_key(record), ())
        if not self.warm:
            return patience.unlearnt_s
        limit = max(patience.ceiling_s, patience.steps * self.step_s)
        if len(took) < LEARNT:
            return limit
        return min(limit, max(patience.floor_s, 10 * _p99(took), 2 * self.step_s))


def _key(record: Record) -> Key:
    return record.group, int(record.op), record.bytes.bit_length()


def _p99(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
