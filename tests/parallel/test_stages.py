"""Stages: placements as drawn, and units that tile the chain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.stages import SCHEDULES, buckets, num_stages, stages_of_rank, units_of_stage


def test_placements_as_drawn() -> None:
    assert stages_of_rank("1f1b", 2) == ((0,), (1,))
    assert stages_of_rank("interleaved_1f1b", 2) == ((0, 2), (1, 3))
    assert stages_of_rank("zbv_zero_bubble", 2) == ((0, 3), (1, 2))


@given(st.sampled_from(SCHEDULES), st.integers(1, 8))
def test_every_stage_is_held_once(schedule: str, pp: int) -> None:
    held = [stage for rank in stages_of_rank(schedule, pp) for stage in rank]
    assert sorted(held) == list(range(num_stages(schedule, pp)))


@given(st.integers(1, 40), st.integers(1, 40))
def test_units_tile_the_chain_and_every_stage_has_a_layer(num_layers: int, stages: int) -> None:
    if stages > num_layers:
        with pytest.raises(ValueError, match="need as many layers"):
            units_of_stage(num_layers, stages, 0)
        return
    parts = [list(units_of_stage(num_layers, stages, stage)) for stage in range(stages)]
    assert [unit for part in parts for unit in part] == list(range(num_layers + 2))
    layers = [sum(1 <= unit <= num_layers for unit in part) for part in parts]
    assert max(layers) - min(layers) <= 1
    assert min(layers) >= 1


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 200))
def test_buckets_are_the_last_layers_cut_where_they_hold_enough(sizes: list[int], least: int) -> None:
    found = buckets(sizes, least)
    first = found[0].start if found else len(sizes)
    assert [layer for bucket in found for layer in bucket] == list(range(first, len(sizes)))
    assert sum(sizes[:first]) < least
    for bucket in found:
        assert sum(sizes[i] for i in bucket) >= least > sum(sizes[i] for i in bucket[1:])


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of gpipe, 1f1b"):
        stages_of_rank("2f2b", 2)
