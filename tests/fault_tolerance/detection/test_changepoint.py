"""A new level is found soon, noise is not taken for one."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from fault_tolerance.detection.changepoint import Change, ChangePoints

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def series(seed: int, noise: float, factor: float, *, before: int = 80, after: int = 50) -> list[float]:
    dice = np.random.default_rng(seed)
    levels = [1.0] * before + [factor] * after
    return [level * float(np.exp(noise * dice.standard_normal())) for level in levels]


def changes(values: list[float], **options: float) -> list[tuple[int, Change]]:
    points = ChangePoints(**options)
    return [(at, change) for at, value in enumerate(values) if (change := points.add(value))]


@pytest.mark.parametrize("factor", [1.1, slow(1.2), slow(1.5), slow(2.0), 0.8])
def test_a_new_level_is_found_within_a_few_samples(factor):
    for seed in range(20):
        ((at, change),) = changes(series(seed, 0.02, factor))
        assert 80 <= at <= 88
        assert abs(change.since - 80) <= 1
        assert change.ratio == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize("noise", [slow(0.01), 0.05, slow(0.2)])
def test_noise_alone_is_no_change(noise):
    assert sum(len(changes(series(seed, noise, 1.0, after=120))) for seed in range(20)) == 0


def test_a_single_spike_is_no_change():
    values = series(3, 0.02, 1.0)
    values[60] = 4.0
    assert changes(values) == []


def test_a_level_that_comes_back_is_two_changes():
    values = series(1, 0.02, 1.5, after=30) + series(2, 0.02, 1.0, before=40, after=0)
    assert [round(change.ratio, 1) for _, change in changes(values)] == [1.5, 0.7]


def test_samples_must_be_positive():
    with pytest.raises(ValueError, match="positive numbers, got 0"):
        ChangePoints().add(0.0)
