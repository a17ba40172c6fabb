"""The sample order is a bijection in every epoch, a pure function, and different for every seed and epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.order import Permutation, digest_words, sample_at

GOLDEN = [5, 3, 4, 6, 2, 0, 7, 8, 9, 1, 6, 9, 1, 8, 4, 5, 2, 3, 0, 7]
GOLDEN_WORD = 10093354209877388555


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_size_is_permuted(size: int) -> None:
    permutation = Permutation.keyed(size, 0, size)
    assert sorted(map(permutation, range(size))) == list(range(size))


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_each_epoch_uses_every_sample_once(size: int, seed: int, epoch: int) -> None:
    first = epoch * size
    assert {sample_at(first + i, seed=seed, num_samples=size) for i in range(size)} == set(range(size))


@given(size=st.integers(1, 2**62), index=st.integers(0, 2**62), seed=st.integers(0, 2**32))
def test_huge_splits_stay_inside_and_cost_no_memory(size: int, index: int, seed: int) -> None:
    assert 0 <= sample_at(index, seed=seed, num_samples=size) < size


def test_seeds_and_epochs_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_at(epoch * 500 + i, seed=seed, num_samples=500) for i in range(500)]

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == len(orders)
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 12  # about one fixed point is expected


def test_neighbours_are_scattered() -> None:
    size = 4096
    order = [sample_at(i, seed=7, num_samples=size) for i in range(size)]
    gaps = [abs(a - b) for a, b in zip(order, order[1:], strict=False)]
    assert abs(sum(gaps) / len(gaps) / size - 1 / 3) < 0.02  # two random points of a segment are a third apart
    assert abs(sum(order[: size // 4]) / (size // 4) / size - 0.5) < 0.03


def test_the_order_never_changes_between_versions() -> None:
    """A run that is resumed by a newer version must see the same samples, so the values are part of the format."""
    assert [sample_at(i, seed=0, num_samples=10) for i in range(20)] == GOLDEN
    assert digest_words(1, 0, 0) == (GOLDEN_WORD,)


def test_wrong_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        Permutation.keyed(0, 1)
    with pytest.raises(ValueError, match=r"\[0, 4\), got 4"):
        Permutation.keyed(4, 1)(4)
    with pytest.raises(ValueError, match="got -1 and 4"):
        sample_at(-1, seed=0, num_samples=4)
