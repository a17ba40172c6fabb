"""Shares of a global batch: every sample once, the shortest step of all ways to deal, and a reason where nothing is gained."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.detection.balance import balanced, deal


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4), st.integers(0, 6))
def test_dealing_to_who_is_done_first_is_the_best_of_all_ways(seconds: list[float], more: int) -> None:
    total = len(seconds) + more
    ways = (c for c in itertools.product(range(1, total + 1), repeat=len(seconds)) if sum(c) == total)
    best = min(max(n * s for n, s in zip(c, seconds, strict=True)) for c in ways)
    counts = deal(seconds, total)
    assert sum(counts) == total and min(counts) >= 1
    assert max(n * s for n, s in zip(counts, seconds, strict=True)) == pytest.approx(best)


def test_a_replica_that_needs_twice_as_long_takes_a_third() -> None:
    """Of a step of 0.5 s, 0.2 s are a well replica's computation and 0.1 s go into other things."""
    shares = balanced((1.0, 2.0), global_batch=24, num_microbatches=1, step_s=0.5, compute_s=0.2)
    assert shares.samples == (16, 8)
    assert shares.step_s == pytest.approx(0.5 - 0.2 * (2 - 16 / 12))
    assert shares.reason == "replicas take 16, 8 of 24 samples, for they compute 1.00, 2.00 times as long"


@given(st.lists(st.floats(1.0, 5.0), min_size=2, max_size=5), st.integers(2, 200), st.integers(1, 6))
def test_every_sample_is_given_out_once_and_the_step_gets_shorter_by_it(slowness: list[float], batch: int, microbatches: int) -> None:
    shares = balanced(slowness, global_batch=batch, num_microbatches=microbatches, step_s=1.0, compute_s=0.15)
    if shares.samples:
        assert sum(shares.samples) == batch and min(shares.samples) >= 1
        assert 0 < shares.step_s <= 0.95
    else:
        assert shares.step_s == 1.0 and shares.reason


def test_a_batch_that_does_not_fill_its_last_row_is_short_where_most_is_to_be_done() -> None:
    shares = balanced((1.0, 3.0), global_batch=15, num_microbatches=2, step_s=1.0, compute_s=0.3)
    assert shares.samples == (11, 4)


@pytest.mark.parametrize(
    ("slowness", "batch", "microbatches", "why"),
    [
        ((3.0,), 8, 1, "one replica (dp 1)"),
        ((1.0, 3.0), 8, 4, "one row a microbatch"),
        ((1.0, 1.1), 4, 1, "the best shares, 2, 2 of 4 rows, would leave the step at 1.000 s"),
    ],
)
def test_where_nothing_is_gained_it_says_why(slowness: tuple[float, ...], batch: int, microbatches: int, why: str) -> None:
    shares = balanced(slowness, global_batch=batch, num_microbatches=microbatches, step_s=1.0, compute_s=0.3)
    assert shares.samples == () and why in shares.reason


def test_too_few_to_deal_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 or more"):
        deal([1.0, 1.0, 1.0], 2)
