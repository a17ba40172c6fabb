"""What is done about slowness costs at most twice what knowing the future would have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.detection.actions import Action, Option, choose
from fault_tolerance.detection.quarantine import Quarantine

OPTIONS = (
    Option(Action.IGNORE, 0.0, 2.0),
    Option(Action.REBALANCE, 5.0, 1.5),
    Option(Action.SWAP, 40.0, 1.0, "one spare"),
)


def at(lost_s: float, steps_left: int = 1000):
    return choose(OPTIONS, step_s=2.0, healthy_step_s=1.0, steps_left=steps_left, lost_s=lost_s)


def test_actions_come_when_as_much_was_lost_as_they_cost():
    assert [at(lost).action for lost in (0, 4.9, 5, 39, 40)] == [
        Action.IGNORE,
        Action.IGNORE,
        Action.REBALANCE,
        Action.REBALANCE,
        Action.SWAP,
    ]
    assert (at(0).next_at_s, at(5).next_at_s, at(40).next_at_s) == (5.0, 40.0, None)


def test_what_cannot_pay_back_before_the_end_is_never_done():
    assert at(1000, steps_left=4).action == Action.IGNORE
    assert at(1000, steps_left=30).action == Action.REBALANCE
    assert "never pays" in "\n".join(at(1000, steps_left=30).comparison)


def test_the_comparison_has_every_option_with_its_figures():
    choice = at(6.0)
    assert len(choice.comparison) == 3
    assert "swap: costs 40.0 s, step 1.000 s, saves 1000.0 s in 1000 steps: later (one spare)" in choice.comparison
    assert "6.0 s lost" in choice.reason


@given(st.floats(1.1, 5.0), st.floats(0.5, 500.0), st.integers(1, 2000))
def test_waiting_for_the_cost_is_at_most_twice_the_best(slow_s, cost_s, lasts_steps):
    """The slowness ends after `lasts_steps`, which nobody knows; a horizon of 100,000 steps is left."""
    options = (Option(Action.IGNORE, 0.0, slow_s), Option(Action.SWAP, cost_s, 1.0))
    lost = 0.0
    for _ in range(lasts_steps):
        if choose(options, step_s=slow_s, healthy_step_s=1.0, steps_left=100_000, lost_s=lost).action == Action.SWAP:
            lost += cost_s
            break
        lost += slow_s - 1.0
    best = min(lasts_steps * (slow_s - 1.0), cost_s)
    assert lost <= 2 * best + (slow_s - 1.0) + 1e-9


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="step times must be positive"):
        choose(OPTIONS, step_s=0.0, healthy_step_s=1.0, steps_left=1, lost_s=0.0)


def test_quarantine_ends_and_doubles():
    first = Quarantine().add("a", "slow", now_s=100, base_s=60)
    assert first.holds("a", 159) and not first.holds("a", 160) and not first.holds("b", 100)
    again = first.add("a", "slow again", now_s=200, base_s=60)
    assert again.holds("a", 319) and not again.holds("a", 320)
    assert [(e.node, e.reason, e.times) for e in again.active(300)] == [("a", "slow again", 2)]


def test_a_person_can_lift_what_never_ends():
    held = Quarantine().add("a", "corrupts", now_s=0, base_s=0).add("b", "slow", now_s=5, base_s=10)
    assert held.holds("a", 1e9)
    assert not held.lift("a", now_s=7).holds("a", 7) and held.lift("a", now_s=7).holds("b", 7)
    with pytest.raises(ValueError, match="must not be negative"):
        held.add("c", "?", now_s=0, base_s=-1)


def test_a_machine_that_comes_and_goes_is_evicted_and_one_that_was_lost_long_ago_is_not():
    held = Quarantine()
    for at in (0, 500, 1000):
        held = held.lost("a", now_s=at, base_s=60)
    assert not held.holds("a", 1000)
    held = held.lost("b", now_s=1010, base_s=60).lost("a", now_s=1020, base_s=60)
    assert held.holds("a", 1020) and not held.holds("b", 1020)
    assert held.reasons(1030) == {"a": "a was lost 3 times in 600 s; not used for 50 s"}
    assert held.reasons(1080) == {}
