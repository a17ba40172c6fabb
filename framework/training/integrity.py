"""Integrity: silent corruption of the training state, found by sums of its bits and named by rank.

    update of step s -> sums -> forward, backward of s+1 -> sums again      nothing may write in between: who differs, is it
                        sums of what several ranks hold, side by side       replicas that must be equal: the odd one out

A sum of the words of a tensor changes with every single bit, needs no copy and runs where the tensor is. A rank whose own
memory changed is certain; of two replicas that differ nobody can tell, and both are named.

Rule of this file: it compares. What is done about it is the controller's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fault_tolerance.detection.numerics import judge_replicas
from fault_tolerance.detection.verdict import Topology
from parallel.atlas import Atlas, Piece

State = Callable[[], Mapping[Piece, Tensor]]


class Integrity:
    """One rank's state under watch every `every` steps. `share` gives everybody's value, by rank: a collective."""

    def __init__(
        self, state: State, atlas: Atlas, *, rank: int, every: int, share: Callable[[Any], list[Any]], start: int = 0
    ) -> None:
        self._state, self._every, self._share = state, every, share
        self._topology = Topology.one_node_each(atlas.layout)
        self._replicated = [
            piece for piece in atlas.held(rank) if len(atlas.holders(atlas.by_name[piece.tensor], rank)) > 1
        ]
        self._at_rest: dict[Piece, int] | None = None
        self._trusted: int | None = None
        self._changed: list[Piece] = []
        self.clean = start  # the newest step whose state is known to be good

    def settle(self, step: int) -> tuple[tuple[int, ...], str]:
        """After an update: (ranks whose copy differs from the others', the reason), equal on all ranks. Call it on all."""
        if step % self._every:
            self._at_rest = None
            return (), ""
        sums = sums_of(self._state())
        told = self._share({f"{p.tensor} {p.box}": sums[p] for p in self._replicated if p in sums})
        by_piece: dict[str, dict[int, int]] = {}
        for rank, theirs in enumerate(told):
            for piece, value in theirs.items():
                by_piece.setdefault(piece, {})[rank] = value
        for piece, values in sorted(by_piece.items()):
            for verdict in judge_replicas({r: (piece, v) for r, v in values.items()}, self._topology):
                return verdict.ranks, verdict.reason
        self._at_rest, self._trusted = sums, step
        return (), ""

    def changed(self) -> str:
        """Before the next update: the tensor of this rank that has changed since `settle`, though nobody wrote to it."""
        if self._at_rest is None:
            return ""
        sums = sums_of(self._state())
        self._changed = [piece for piece, value in self._at_rest.items() if sums[piece] != value]
        return self._changed[0].tensor if self._changed else ""

    def well_kept(self, staged: Mapping[Piece, Tensor]) -> bool:
        """Whether copies that were made meanwhile have all that has changed here as it was before."""
        if self._at_rest is None or not all(piece in staged for piece in self._changed):
            return False
        sums = sums_of({piece: staged[piece] for piece in self._changed})
        return all(sums[piece] == self._at_rest[piece] for piece in self._changed)

    def passed(self) -> None:
        """No rank has found a change: the state that was settled last is known to be good."""
        if self._at_rest is not None and self._trusted is not None:
            self.clean = self._trusted


@torch.no_grad()
def sums_of(state: Mapping[Piece, Tensor]) -> dict[Piece, int]:
    """For each tensor of 4-byte elements the sum of its words as integers, modulo 2^64."""
    pieces = sorted(piece for piece in state if state[piece].numel())
    if not pieces:
        return {}
    sums = torch.stack([state[piece].view(torch.int32).sum(dtype=torch.int64) for piece in pieces])
    return dict(zip(pieces, sums.tolist(), strict=True))


@torch.no_grad()
def flip_bit(state: Mapping[Piece, Tensor], *, bit: int = 20) -> str:
    """Drill: flip one bit in the middle of this rank's largest parameter; returns its name. Bit 20 changes it by 1/8 or so."""
    piece = max((p for p in state if p.tensor.startswith("param/")), key=lambda p: (state[p].numel(), p))
    words = state[piece].view(torch.int32).view(-1)
    words[len(words) // 2] ^= 1 << bit
    return piece.tensor
