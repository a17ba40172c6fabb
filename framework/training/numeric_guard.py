"""Numeric guard: what is done with a step whose loss or gradient is not to be believed, before it is applied.

    once more, same batch, same state     a fault of one computation does not come back
    left out                              a batch that spoils the step does
    stop                                  after `max_skips` in a row

The update has not happened yet, so the state before the step is still there and nothing needs to be read back. All ranks
see the same numbers, so all decide alike.

Rule of this file: it remembers losses and decides by `fault_tolerance/detection/numerics.py`; it computes nothing.
"""

from __future__ import annotations

from collections import deque

from fault_tolerance.detection.numerics import Decision, Remedy, decide

HISTORY = 64


class NumericGuard:
    """The steps of one generation."""

    def __init__(self, *, spike_sigma: float | None, max_skips: int) -> None:
        self._sigma, self._max_skips = spike_sigma, max_skips
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._skipped = 0
        self._retried = False

    def judge(self, loss: float, grad_norm: float) -> Decision:
        """What to do with a step. RETRY comes at most once a step."""
        decision = decide(
            loss,
            grad_norm,
            self._losses,
            spike_sigma=self._sigma,
            max_skips=self._max_skips,
            skipped_in_a_row=self._skipped,
            retried=self._retried,
        )
        self._retried = decision.remedy is Remedy.RETRY
        if decision.remedy is Remedy.KEEP:
            self._losses.append(loss)
            self._skipped = 0
        elif decision.remedy is Remedy.SKIP:
            self._skipped += 1
        return decision
