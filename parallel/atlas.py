"""Atlas: who holds which box of which tensor under a layout.

    specs (what the state is)  x  layout (how it is cut)  ->  for every rank, its pieces

    tp cuts a tensor along its `tp_dim` first; dp (FSDP) then cuts what is left along dim 0; pp deals out units of
    the chain. Where several ranks hold the same box (a norm under tp, a tied embedding under pp), `held` lists it
    for each of them, and `owned` splits it among them, so that the owned pieces of all ranks tile the state once.

Rule of this file: pure. Tested equal to what DTensor really holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.boxes import Box, chunk, even
from parallel.layout import Layout
from parallel.stages import num_stages, stages_of_rank, units_of_stage

STATE_KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor of the training state, whatever the layout.

    `name` is `<kind>/<parameter>`, e.g. `exp_avg/layers.0.attention.wq.weight`; `dtype` a numpy name;
    `tp_dim` the dimension that tensor parallelism cuts, None where it replicates; `units` the places in the
    model's chain (see `stages.py`) that use it: two for a tied embedding, else one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tp_dim: int | None
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A box of a named tensor."""

    tensor: str
    box: Box


@dataclass(frozen=True)
class Atlas:
    """The pieces of every rank for a state (`specs`) under a layout and a pipeline schedule."""

    specs: tuple[TensorSpec, ...]
    layout: Layout
    schedule: str
    num_layers: int

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """The specs by tensor name."""
        return {spec.name: spec for spec in self.specs}

    def units(self, pp: int) -> frozenset[int]:
        """The units of the chain that a pp coordinate holds."""
        stages = num_stages(self.schedule, self.layout.pp)
        held = stages_of_rank(self.schedule, self.layout.pp)[pp]
        return frozenset(u for stage in held for u in units_of_stage(self.num_layers, stages, stage))

    def held(self, rank: int) -> tuple[Piece, ...]:
        """Every non-empty box the rank holds, in the order of `specs`."""
        pp, dp, tp = self.layout.seat(rank)
        units = self.units(pp)
        pieces = (Piece(s.name, self._box(s, dp, tp)) for s in self.specs if not units.isdisjoint(s.units))
        return tuple(piece for piece in pieces if piece.box.size)

    def owned(self, rank: int) -> tuple[Piece, ...]:
        """The rank's share to save: boxes that several ranks hold are split evenly among them along dim 0."""
        return tuple(piece for piece in self._owned(rank) if piece.box.size)

    def _owned(self, rank: int) -> Iterator[Piece]:
        for piece in self.held(rank):
            holders = self.holders(self.by_name[piece.tensor], rank)
            index = holders.index(rank)
            if not piece.box.shape:
                if index == 0:
                    yield piece
                continue
            yield Piece(piece.tensor, piece.box.cut(0, *even(piece.box.shape[0], len(holders), index)))

    def holders(self, spec: TensorSpec, rank: int) -> Sequence[int]:
        """The ranks, ascending, that hold the same box of this tensor as `rank` does."""
        _, dp, tp = self.layout.seat(rank)
        stages = [p for p in range(self.layout.pp) if not self.units(p).isdisjoint(spec.units)]
        peers = range(self.layout.tp) if spec.tp_dim is None else (tp,)
        replicas = range(self.layout.dp) if not spec.shape else (dp,)
        return [self.layout.rank(p, d, t) for p in stages for d in replicas for t in peers]

    def _box(self, spec: TensorSpec, dp: int, tp: int) -> Box:
        box = Box.whole(spec.shape)
        if spec.tp_dim is not None:
            box = box.cut(spec.tp_dim, *chunk(box.shape[spec.tp_dim], self.layout.tp, tp))
        return box.cut(0, *chunk(box.shape[0], self.layout.dp, dp)) if box.shape else box
