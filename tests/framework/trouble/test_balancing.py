"""Unequal shares: whom they can help, whether they do, and when they are over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fault_tolerance.detection.balance import Shares
from fault_tolerance.detection.verdict import Kind, Verdict
from framework.trouble.balancing import ASK_AGAIN_S, HOLD_STEPS, Balancing, Due, relief
from parallel.layout import Layout

SLOW = Verdict(Kind.SLOW_COMPUTE, (1,), ("n1",), "rank 1 is slow", severity=3.0)


def config(*, engine: str = "fsdp", compile: bool = False, global_batch: int = 16) -> Any:
    return SimpleNamespace(layout=SimpleNamespace(engine=engine, compile=compile), optim=SimpleNamespace(global_batch=global_batch))


def begun() -> Balancing:
    one = Balancing(SLOW, Shares((12, 4), 0.2, "because"), before_s=0.4, healthy_s=0.2, longest_s=0.3, asked_s=0.0)
    one.since = 10
    return one


def test_all_ranks_of_a_replica_wait_for_its_slow_one() -> None:
    """Of 2x2x1, rank 1 is stage 0 of replica 1; a step of 0.4 s, 0.2 s if it were well: a well replica computes for 0.1 s."""
    shares = relief(config(), Layout(2, 2, 1), 2, [SLOW], step_s=0.4, healthy_s=0.2)
    assert shares.samples == (12, 4) and shares.step_s == pytest.approx(0.4 - 0.1 * (3 - 1.5))


@pytest.mark.parametrize(("given", "why"), [({"engine": "deepspeed"}, "layout.engine=deepspeed"), ({"compile": True}, "layout.compile")])
def test_where_shares_must_stay_equal_it_says_why(given: dict[str, Any], why: str) -> None:
    shares = relief(config(**given), Layout(1, 2, 1), 1, [SLOW], step_s=0.4, healthy_s=0.2)
    assert not shares.samples and why in shares.reason


def test_a_machine_that_holds_a_rank_of_every_replica_cannot_be_relieved() -> None:
    node = Verdict(Kind.SLOW_COMPUTE, (0, 1), ("n0",), "n0 is slow", severity=3.0)
    assert not relief(config(), Layout(2, 2, 1), 1, [node], step_s=0.4, healthy_s=0.2).samples


def test_a_request_that_was_lost_is_made_again() -> None:
    one = begun()
    one.since = None
    assert one.look(12, {}, 0.4, ASK_AGAIN_S - 1) is Due.NOTHING
    assert one.look(13, {}, 0.4, ASK_AGAIN_S + 1) is Due.ASK
    assert one.look(14, {}, 0.4, ASK_AGAIN_S + 2) is Due.NOTHING


def test_it_is_over_when_the_slow_one_is_well_for_a_while_and_not_at_a_hiccup() -> None:
    one = begun()
    assert one.look(20, {0: 0.15, 1: 0.16}, 0.25, 1.0) is Due.TELL
    assert one.after_s == pytest.approx(0.4 - 0.3 + 0.16)
    assert one.look(22, {0: 0.15, 1: 0.05}, 0.25, 2.0) is Due.NOTHING
    assert one.look(23, {0: 0.15, 1: 0.16}, 0.25, 3.0) is Due.NOTHING
    assert one.look(30, {0: 0.15, 1: 0.05}, 0.25, 4.0) is Due.NOTHING
    assert one.look(30 + HOLD_STEPS, {0: 0.15, 1: 0.05}, 0.25, 5.0) is Due.ALIKE and one.helped
    assert "rank 1 computes 0.31 times" in one.why


def test_a_busy_machine_whose_steps_got_longer_does_not_end_it_but_a_rank_that_computes_longer_does() -> None:
    one = begun()
    one.look(20, {0: 0.15, 1: 0.16}, 0.25, 1.0)
    assert one.look(40, {0: 0.15, 1: 0.16}, 2.5, 2.0) is Due.NOTHING
    assert one.look(41, {0: 0.30, 1: 0.16}, 0.4, 3.0) is Due.NOTHING
    assert one.look(41 + HOLD_STEPS, {0: 0.30, 1: 0.16}, 0.4, 4.0) is Due.ALIKE
    assert "rank 0 computes 2.00 times" in one.why


def test_what_does_not_help_is_taken_back() -> None:
    one = begun()
    assert one.look(20, {0: 0.29, 1: 0.29}, 0.39, 1.0) is Due.ALIKE
    assert not one.helped and "does not help" in one.why
