"""How often to snapshot: the formulas against a search, a simulation and the published figures."""

from __future__ import annotations

import math
import random

import pytest

from fault_tolerance.snapshots import interval


def test_youngs_interval_is_where_the_least_time_is_lost() -> None:
    for cost_s, mtbf_s in ((0.1, 3600), (5, 10_000), (60, 10_800)):
        best = min(
            (interval.lost_share(interval_s=t, cost_s=cost_s, mtbf_s=mtbf_s), t)
            for t in (math.exp(x / 500) for x in range(1, 6000))
        )[1]
        assert interval.young_s(cost_s=cost_s, mtbf_s=mtbf_s) == pytest.approx(best, rel=0.01)


def test_reference_figures() -> None:
    """Three hours between failures: a cost of 60 s gives 1138 s and 10.5% lost, 1 s gives 147 s and 1.4%."""
    for cost_s, every_s, share in ((60, 1138, 0.105), (1, 147, 0.014)):
        found = interval.young_s(cost_s=cost_s, mtbf_s=10_800)
        assert found == pytest.approx(every_s, rel=0.001)
        assert interval.lost_share(interval_s=found, cost_s=cost_s, mtbf_s=10_800) == pytest.approx(share, abs=5e-4)


def simulate(every_s: float, cost_s: float, mtbf_s: float, seed: int) -> float:
    """Time to do 200 MTBFs of work when a snapshot of `cost_s` follows each `every_s` of it, with random failures."""
    rng, done, clock = random.Random(seed), 0.0, 0.0
    failure = rng.expovariate(1 / mtbf_s)
    while done < 200 * mtbf_s:
        end = clock + every_s + cost_s
        if failure < end:
            clock, failure = failure, failure + rng.expovariate(1 / mtbf_s)
        else:
            clock, done = end, done + every_s
    return clock


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(1.0, 100.0), (20.0, 100.0)])
def test_dalys_interval_beats_others_in_simulation(cost_s: float, mtbf_s: float) -> None:
    def time(every_s: float) -> float:
        return sum(simulate(every_s, cost_s, mtbf_s, seed) for seed in range(20))

    best = interval.daly_s(cost_s=cost_s, mtbf_s=mtbf_s)
    assert time(best) < min(time(best / 3), time(best * 3))
    assert best == pytest.approx(interval.young_s(cost_s=cost_s, mtbf_s=mtbf_s), rel=0.5)


def test_a_cost_above_twice_the_mtbf_and_none_at_all() -> None:
    assert interval.daly_s(cost_s=300, mtbf_s=100) == 100
    assert interval.young_s(cost_s=0, mtbf_s=100) == 0
    assert math.isinf(interval.young_s(cost_s=1, mtbf_s=math.inf))


def test_the_stall_is_what_the_copy_does_not_hide() -> None:
    assert interval.stall_s(node_bytes=10e9, copy_bytes_per_s=5e9, overlap_s=1.5) == pytest.approx(0.5)
    assert interval.stall_s(node_bytes=10e9, copy_bytes_per_s=5e9, overlap_s=3) == 0


def test_the_least_interval_is_the_slowest_of_copy_code_and_wire() -> None:
    rates = {"copy_bytes_per_s": 4e9, "encode_bytes_per_s": 20e9, "wire_bytes_per_s": 1e9}
    least = interval.least_interval_s(node_bytes=8e9, num_nodes=8, m=2, **rates)
    assert least == pytest.approx(8 * 7 / 6)
    assert interval.least_interval_s(node_bytes=8e9, num_nodes=8, m=0, **rates) == 2
    slow = rates | {"encode_bytes_per_s": 0.5e9}
    assert interval.least_interval_s(node_bytes=8e9, num_nodes=2, m=1, **slow) == 16
    with pytest.raises(ValueError, match="got m=2 and num_nodes=2"):
        interval.least_interval_s(node_bytes=1, num_nodes=2, m=2, **rates)


def test_the_choice_is_whole_steps_with_its_reason() -> None:
    mtbf_s = interval.job_mtbf_s(node_mtbf_s=1e6, num_nodes=100)
    young = interval.choose(cost_s=0.05, mtbf_s=mtbf_s, step_s=2.0, least_s=4.0)
    assert young.steps == 16 and "Young's interval" in young.reason and young.interval_s == 32
    bound = interval.choose(cost_s=1e-6, mtbf_s=mtbf_s, step_s=2.0, least_s=5.0)
    assert bound.steps == 3 and "the least interval" in bound.reason
    assert interval.choose(cost_s=0, mtbf_s=mtbf_s, step_s=2.0).steps == 1
    assert interval.choose(cost_s=0, mtbf_s=mtbf_s, step_s=2.0, least_s=6.0).steps == 3
    assert 0 < young.lost_share < 0.01


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="mtbf_s must be > 0, got 0"):
        interval.young_s(cost_s=1, mtbf_s=0)
    with pytest.raises(ValueError, match="cost_s must be >= 0, got -1"):
        interval.young_s(cost_s=-1, mtbf_s=1)
    with pytest.raises(ValueError, match="mtbf_s must be finite"):
        interval.choose(cost_s=1, mtbf_s=math.inf, step_s=1)
    with pytest.raises(ValueError, match="step_s must be > 0, got nan"):
        interval.choose(cost_s=1, mtbf_s=1, step_s=math.nan)
