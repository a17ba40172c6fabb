"""When a snapshot is due, by its interval, for storage, or because it was asked for; and when training waits for one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fault_tolerance.snapshots.interval import fixed
from framework.trainer import Report, Trainer, TrainSettings

NOTHING: Any = SimpleNamespace()


def trainer(*, every: int, durable_every: int = 0, most: int | None = None, **parts: Any) -> Trainer:
    settings = TrainSettings(
        num_steps=100, global_batch=1, tokens_per_step=1, grad_clip=0.0, eval_every=0, held_out_tokens=0,
        interval=lambda cost_s, step_s: fixed(every), max_skips=1, durable_every=durable_every, max_steps_lost=most,
    )  # fmt: skip
    given = {"engine": NOTHING, "feed": NOTHING, "snapshots": NOTHING, "faults": NOTHING, "emit": lambda item: None}
    given |= {"sum_over_ranks": lambda x: x} | parts
    return Trainer(learning_rate=lambda step: 1.0, num_ranks=1, settings=settings, **given)


def report(*, wanted: bool = False) -> Report:
    return Report(
        loss=1.0, grad_norm=1.0, stop=False, hold=False, defer=False, record=False, test=False, wanted=wanted, behind=False, corrupt=False,
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


class Vaults:
    """Snapshots that are protected when so many updates more were taken, 0: during the next forward and backward; at once if
    somebody waits. Some are given up.
    """

    def __init__(self, takes: int, fails: frozenset[int], *, fatal: bool = False) -> None:
        self.takes, self.fails, self.newest, self.waits, self.begun = takes, fails, -1, 0, list[int]()
        self.fatal, self.ends = fatal, False
        self._coming: tuple[int, int] | None = None

    def updated(self) -> None:
        if self._coming is not None:
            step, left = self._coming
            self._coming = (step, left - 1)
            if left <= 1:
                self._settle()

    def _settle(self) -> None:
        assert self._coming is not None
        if self._coming[0] not in self.fails:
            self.newest = self._coming[0]
        self._coming = None

    def ready(self) -> bool:
        return self._coming is None

    def has_room(self) -> bool:
        if self._coming is not None:
            self.waits += 1
            self._settle()
        return True

    def begin(self, step: int, extra: dict[str, Any], tensors: Any) -> None:
        assert self._coming is None, "one at a time"
        self._coming = (step, self.takes)
        self.begun.append(step)

    def protected(self) -> int:
        return self.newest

    def await_protected(self, step: int) -> float:
        if self.newest < step and self._coming is not None:
            self.waits += 1
            self._settle()
        return 0.0

    def await_end(self, step: int, patience_s: float) -> float:
        self.ends = self.ends or self.fatal
        return patience_s

    def gate(self) -> float:
        if self._coming is not None and self.takes == 0:
            self._settle()
        return 0.0

    def cost_s(self) -> float:
        return 0.0

    def copy_s(self) -> float:
        return 0.0

    def why_not_ready(self) -> str:
        return "slow"


def lags(
    *, every: int, most: int | None, takes: int, fails: frozenset[int] = frozenset(), fatal: bool = False
) -> tuple[list[int], Vaults]:
    """What a loss right after each of a hundred updates would cost, and what became of the snapshots. `fatal`: what makes one fail
    ends the generation, which is known in the next collective.
    """
    vaults, seen = Vaults(takes, fails, fatal=fatal), list[int]()

    def sum_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
        if vaults.ends:
            raise RuntimeError("a peer is gone")
        return numbers

    def update(*, step: int, **_: float) -> None:
        seen.append(step - max(0, vaults.newest))
        vaults.updated()

    one = torch.ones(())
    engine = SimpleNamespace(forward_backward=lambda *_, **__: one, grad_square_sum=lambda: one, state=dict, update=update)
    faults = SimpleNamespace(at=lambda *_, **__: None, poisoned=lambda: False)
    feed = SimpleNamespace(batch=lambda step: (None, None))
    one_rank = trainer(
        every=every, most=most, engine=engine, feed=feed, faults=faults, snapshots=vaults, sum_over_ranks=sum_over_ranks
    )
    if fatal:
        with pytest.raises(RuntimeError, match="a peer is gone"):
            one_rank.run(0)
        return seen, vaults
    assert one_rank.run(0).kind == "finished" and len(seen) == 100
    return seen, vaults


@pytest.mark.parametrize(("every", "most"), [(1, 1), (1, 3), (2, 2), (2, 5), (10, 10), (7, 12)])
@pytest.mark.parametrize("takes", [0, 1, 2, 3, 9, 40])
def test_no_more_is_lost_than_may_be_however_long_snapshots_take(every: int, most: int, takes: int) -> None:
    """A loss cost the interval and whatever was taken while the newest snapshot was on its way, with nothing to bound it."""
    seen, vaults = lags(every=every, most=most, takes=takes)
    assert max(seen) <= most
    assert vaults.waits == 0 or takes > 0, "whoever is quick is not waited for"


@pytest.mark.parametrize(("every", "takes"), [(1, 0), (2, 0), (1, 1), (2, 1), (10, 3), (3, 3), (2, 9)])
def test_without_that_nobody_waits_and_a_loss_costs_what_the_guide_says(every: int, takes: int) -> None:
    seen, vaults = lags(every=every, most=None, takes=takes)
    assert vaults.waits <= 1, "the last one, at the end of the run"
    assert max(seen) == max(every, takes) + takes


def test_a_snapshot_that_was_given_up_is_taken_again_as_soon_as_all_ranks_know() -> None:
    seen, vaults = lags(every=4, most=4, takes=0, fails=frozenset({20}))
    assert max(seen) == 6, "the step under way when it was given up, and the one in which the ranks tell each other"
    assert vaults.begun[5:8] == [20, 22, 26] and max(seen[22:]) == 4


@pytest.mark.parametrize("fails", [4, 20])
def test_the_loss_that_made_a_snapshot_fail_costs_no_more_than_may_be_lost(fails: int) -> None:
    """A node was killed while a snapshot was on its way to it; the others saw the snapshot given up and took the next update, which
    needs nobody: three steps were lost where two might be.
    """
    seen, _ = lags(every=2, most=2, takes=0, fails=frozenset({fails}), fatal=True)
    assert max(seen) <= 2 and len(seen) == fails


def test_all_ranks_share_the_batch_as_one_of_them_was_told() -> None:
    """What one rank knows reaches all in the sum of the report, so that they change at the same step."""
    ranks, said = [], []
    for _ in range(2):
        heard: list[tuple[int, ...]] = []
        one = trainer(every=0, feed=SimpleNamespace(share=lambda shares, heard=heard: heard.append(tuple(shares))), emit=said.append)
        one._settings = replace(one._settings, dp=3)
        ranks.append((one, heard))
    for step, wanted in ((1, None), (2, (3, 1, 2)), (3, None), (4, (3, 1, 2)), (5, ())):
        told = ranks[0][0]._as_numbers(wanted)
        summed = [a + b for a, b in zip(told, ranks[1][0]._as_numbers(None), strict=True)]
        for one, _ in ranks:
            one._take_shares(step, summed)
    assert [heard for _, heard in ranks] == [[(3, 1, 2), ()]] * 2
    assert [(item["step"], item["shares"]) for item in said[::2]] == [(2, [3, 1, 2]), (5, [])]
    assert "equally many samples of a global batch from step 6 on" in said[-1]["reason"]
