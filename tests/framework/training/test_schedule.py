"""Learning rates at the corners of every schedule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.training.schedule import SCHEDULES, Schedule


def schedule(kind: str, **values: float) -> Schedule:
    numbers = {"peak": 2.0, "warmup_steps": 10, "schedule_steps": 110, "final_lr_ratio": 0.1, "decay_fraction": 0.2}
    return Schedule(kind=kind, **numbers | values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_warm_up_rises_in_equal_parts_to_the_peak(kind: str) -> None:
    assert [schedule(kind).lr(step) for step in range(1, 11)] == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", {11: 2.0, 110: 2.0, 10**6: 2.0}),
        ("linear", {60: 2 * 0.55, 109: 2 * (0.1 + 0.9 * 0.01), 110: 0.2, 111: 0.2, 10**6: 0.2}),
        ("cosine", {60: 2 * 0.55, 35: 2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), 110: 0.2, 10**6: 0.2}),
        ("wsd", {11: 2.0, 88: 2.0, 99: 2 * 0.55, 110: 0.2, 10**6: 0.2}),
    ],
)
def test_the_shapes(kind: str, rates: dict[int, float]) -> None:
    for step, rate in rates.items():
        assert schedule(kind).lr(step) == pytest.approx(rate)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(0, 50),
    st.integers(1, 200),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 300),
)
def test_rates_never_leave_their_bounds_nor_rise_after_the_warm_up(
    kind: str, warmup: int, steps: int, final: float, decay: float, step: int
) -> None:
    one = Schedule(
        kind=kind, peak=3.0, warmup_steps=warmup, schedule_steps=steps, final_lr_ratio=final, decay_fraction=decay
    )
    assert 0 < one.lr(step) <= 3.0 + 1e-12 or final == 0
    if step > warmup:
        assert one.lr(step + 1) <= one.lr(step) + 1e-12


def test_no_warm_up_starts_at_the_peak_and_a_run_cut_in_two_has_the_same_rates() -> None:
    assert schedule("constant", warmup_steps=0).lr(1) == 2.0
    assert schedule("cosine", warmup_steps=0).lr(1) > 1.99
    whole, rest = schedule("wsd"), schedule("wsd")
    assert [whole.lr(step) for step in range(1, 120)] == [*map(whole.lr, range(1, 50)), *map(rest.lr, range(50, 120))]


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="optim.schedule: must be one of cosine, linear, wsd, constant, got 'cos'"):
        schedule("cos")
    with pytest.raises(ValueError, match="optim.schedule_steps: must be at least 1"):
        schedule("cosine", schedule_steps=0)
