"""Holding: what a rank keeps over the change of a generation is what it had, or nobody trains on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.training.holding import Held, hold, take_up
from framework.training.restoring import RestoreFailed
from parallel.atlas import Piece
from tests.fault_tolerance.snapshots.vaults import atlas_of, shards, whole_state

ATLAS = atlas_of("1x1x1")
MESH: Any = SimpleNamespace(rank=0, sum=lambda values: values.clone())  # of one rank


class Engine:
    """What holding asks of an engine."""

    def __init__(self, state: dict[Piece, torch.Tensor]) -> None:
        self.atlas, self._state, self.step = ATLAS, state, -1

    def state(self) -> dict[Piece, torch.Tensor]:
        return self._state

    def loaded(self, step: int) -> None:
        self.step = step


def engine(seed: int) -> Any:
    return Engine({piece: tensor.clone() for piece, tensor in shards(ATLAS, 0, whole_state(ATLAS, seed)).items()})


def held() -> Held:
    return hold(engine(1), MESH, 12)


def test_what_was_held_is_taken_up_bit_by_bit() -> None:
    before, after = engine(1), engine(2)
    kept = hold(before, MESH, 12)
    for tensor in before.state().values():
        tensor.zero_()  # a copy, not the live memory
    assert take_up(kept, after, MESH, 12)["tier"] == "local"
    assert after.step == 12
    assert all(torch.equal(t.view(torch.int32), engine(1).state()[p].view(torch.int32)) for p, t in after.state().items())


@pytest.mark.parametrize("kept", [None, replace(held(), step=11), replace(held(), rank=1), replace(held(), state={})])
def test_who_holds_nothing_or_something_else_says_so(kept: Held | None) -> None:
    new = engine(2)
    with pytest.raises(RestoreFailed, match="must hold the state of rank 0 after step 12"):
        take_up(kept, new, MESH, 12)
    assert new.step == -1


def test_one_bit_that_has_changed_meanwhile_is_seen() -> None:
    kept, new = held(), engine(2)
    next(iter(kept.state.values())).view(torch.int32).view(-1)[0] ^= 1
    with pytest.raises(RestoreFailed, match="digest of the state must be"):
        take_up(kept, new, MESH, 12)
    assert new.step == -1
