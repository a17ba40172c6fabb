"""When a snapshot is due: by its interval, for storage, or because it was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fault_tolerance.interval import fixed
from framework.trainer import Report, Trainer, TrainSettings


def trainer(*, every: int, durable_every: int) -> Trainer:
    nothing: Any = SimpleNamespace()
    settings = TrainSettings(
        num_steps=100, global_batch=1, tokens_per_step=1, grad_clip=0.0, eval_every=0, held_out_tokens=0,
        interval=lambda cost_s, step_s: fixed(every), max_skips=1, durable_every=durable_every,
    )  # fmt: skip
    return Trainer(
        engine=nothing, feed=nothing, learning_rate=lambda step: 1.0, snapshots=nothing, faults=nothing,
        sum_over_ranks=lambda x: x, num_ranks=1, settings=settings, emit=lambda item: None,
    )  # fmt: skip


def report(*, wanted: bool = False) -> Report:
    return Report(
        loss=1.0, grad_norm=1.0, stop=False, defer=False, record=False, test=False, wanted=wanted, corrupt=False,
        snapshot_cost_s=0.0, step_time_s=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("every", "durable_every", "steps"),
    [(40, 0, {40, 80}), (40, 15, {15, 30, 45, 60, 75, 90}), (0, 30, {30, 60, 90}), (0, 0, set()), (20, 50, {20, 40, 50, 70, 90, 100})],
)  # fmt: skip
def test_storage_does_not_wait_for_the_interval_of_snapshots(every: int, durable_every: int, steps: set[int]) -> None:
    """`durable.every_steps=10` with the automatic interval of 105 steps saved at step 122, and never at 10."""
    one, taken = trainer(every=every, durable_every=durable_every), set()
    for step in range(1, 101):
        if one._due(step, report()):
            taken.add(step)
            one._last_snapshot = step
    assert taken == steps


def test_one_that_is_asked_for_is_due_at_once() -> None:
    one = trainer(every=0, durable_every=0)
    assert not one._due(3, report())
    assert one._due(3, report(wanted=True))
