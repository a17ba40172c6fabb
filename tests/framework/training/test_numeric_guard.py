"""A step that is not believed is computed once more, then left out, and after too many the run is told to stop."""

from __future__ import annotations

import math

from fault_tolerance.detection.numerics import Remedy
from framework.training.numeric_guard import NumericGuard


def guard(**given: float) -> NumericGuard:
    made = NumericGuard(spike_sigma=given.get("sigma"), max_skips=2)
    for step in range(20):
        assert made.judge(2.0 + 0.01 * (step % 3), 1.0).remedy is Remedy.KEEP
    return made


def test_a_fault_of_one_computation_does_not_come_back() -> None:
    watch = guard()
    assert watch.judge(math.nan, 1.0).remedy is Remedy.RETRY
    assert watch.judge(2.0, 1.0).remedy is Remedy.KEEP
    assert watch.judge(math.nan, 1.0).remedy is Remedy.RETRY  # another step: it is tried once more again


def test_batches_that_spoil_their_steps_are_left_out_and_too_many_stop_the_run() -> None:
    watch = guard()
    for _ in range(2):
        assert watch.judge(math.inf, 1.0).remedy is Remedy.RETRY
        assert watch.judge(math.inf, 1.0).remedy is Remedy.SKIP
    assert watch.judge(math.inf, 1.0).remedy is Remedy.STOP


def test_a_good_step_in_between_starts_the_count_again() -> None:
    watch = guard()
    for _ in range(3):
        assert watch.judge(2.0, math.nan).remedy is Remedy.RETRY
        assert watch.judge(2.0, math.nan).remedy is Remedy.SKIP
        assert watch.judge(2.0, 1.0).remedy is Remedy.KEEP


def test_a_spike_counts_only_where_it_was_asked_for() -> None:
    assert guard().judge(9.0, 1.0).remedy is Remedy.KEEP
    watch = guard(sigma=6.0)
    assert watch.judge(9.0, 1.0).remedy is Remedy.RETRY
    assert watch.judge(9.0, 1.0).remedy is Remedy.SKIP
    assert watch.judge(2.0, 1.0).remedy is Remedy.KEEP
