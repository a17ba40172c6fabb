"""One bit of the training state that changes by itself is found, and the rank on which it did is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from framework.training.integrity import Integrity, flip_bit, sums_of
from parallel.atlas import Atlas, Piece, TensorSpec
from parallel.boxes import Box
from parallel.layout import Layout

SPECS = (
    TensorSpec("param/norm", (8,), "float32", None, (0,)),
    TensorSpec("param/weight", (8, 4), "float32", 0, (0,)),
)


def ranks(tp: int, every: int) -> tuple[list[dict[Piece, Tensor]], list[Integrity]]:
    """The states of tp ranks, and their watches, which share by asking each other in this process."""
    atlas = Atlas(SPECS, Layout(1, 1, tp), "1f1b", 1)
    states = [{p: torch.ones(p.box.shape) for p in atlas.held(rank)} for rank in range(tp)]
    told: list[dict[str, int]] = [{} for _ in range(tp)]

    def share(rank: int, value: dict[str, int]) -> list[dict[str, int]]:
        told[rank] = value
        return told

    watches = [
        Integrity(lambda r=r: states[r], atlas, rank=r, every=every, share=lambda v, r=r: share(r, v))  # type: ignore[misc]
        for r in range(tp)
    ]
    return states, watches


def norm(state: dict[Piece, Tensor]) -> Tensor:
    return next(tensor for piece, tensor in state.items() if piece.tensor == "param/norm")


def settle(watches: list[Integrity], step: int) -> list[tuple[tuple[int, ...], str]]:
    for watch in watches:
        watch.settle(step)  # the first round only fills what is shared
    return [watch.settle(step) for watch in watches]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_a_bit_that_flips_between_two_updates_is_found_by_the_rank_itself() -> None:
    states, watches = ranks(2, 1)
    assert settle(watches, 1) == [((), ""), ((), "")]
    assert [watch.changed() for watch in watches] == ["", ""]
    for watch in watches:
        watch.passed()
    settle(watches, 2)
    flip_bit(states[1])
    assert [watch.changed() for watch in watches] == ["", "param/weight"]
    assert [watch.clean for watch in watches] == [1, 1]


def test_the_replica_that_differs_from_the_majority_is_named_on_all_ranks() -> None:
    states, watches = ranks(4, 2)
    assert all(odd == () for odd, _ in settle(watches, 1))  # not due
    norm(states[2]).view(torch.int32)[3] ^= 1
    found = settle(watches, 2)
    assert {odd for odd, _ in found} == {(2,)}
    assert "param/norm" in found[0][1]


def test_of_two_replicas_that_differ_both_are_named() -> None:
    states, watches = ranks(2, 1)
    norm(states[0])[0] = 3.0
    assert {odd for odd, _ in settle(watches, 1)} == {(0, 1)}


@pytest.mark.parametrize("bit", [0, 12, 22, 30, 31])
def test_every_single_bit_counts(bit: int) -> None:
    piece = Piece("param/a", Box.whole((1000,)))
    state = {piece: torch.randn(1000), Piece("exp_avg/a", piece.box): torch.randn(1000)}
    before = sums_of(state)
    words = state[piece].view(torch.int32)
    words[777] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert sums_of(state) != before


def test_a_copy_from_before_the_flip_is_told_from_one_of_after_it() -> None:
    states, watches = ranks(2, 1)
    settle(watches, 1)
    before = {piece: tensor.clone() for piece, tensor in states[1].items()}
    flip_bit(states[1])
    assert watches[1].changed() == "param/weight"
    assert watches[1].well_kept(before)
    assert not watches[1].well_kept(states[1])
    assert not watches[1].well_kept({})  # the copy has not all that changed: nobody knows
