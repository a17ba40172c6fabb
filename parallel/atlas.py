"""Atlas: who holds which box of which tensor under a layout.

    specs (what the state is)  x  layout (how it is cut)  ->  for every rank, its pieces

    tp cuts a tensor along its `tp_dim` first; dp then cuts what is left, as `sharding` says; pp deals out units of
    the chain. Where several ranks hold the same box (a norm under tp, a tied embedding under pp), `held` lists it
    for each of them, and `owned` splits it among them, so that the owned pieces of all ranks tile the state once.

    sharding   used by       dp cuts
    rows       FSDP2         each tensor along dim 0
    flat       ZeRO-3        each tensor's elements, row-major         a flat range is a few boxes (`flat.py`), so a
    groups     ZeRO-1, 2     those of a whole group, end to end        rank may hold several pieces of a tensor

Rule of this file: pure. Tested equal to what DTensor really holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.boxes import Box, boxes_of_range, chunk, even
from parallel.flat import Flat, flats
from parallel.layout import Layout
from parallel.stages import num_stages, stages_of_rank, units_of_stage

STATE_KINDS = ("param", "exp_avg", "exp_avg_sq")
SHARDINGS = ("rows", "flat", "groups")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor of the training state, whatever the layout.

    `name` is `<kind>/<parameter>`, e.g. `exp_avg/layers.0.attention.wq.weight`; `dtype` a numpy name;
    `tp_dim` the dimension that tensor parallelism cuts, None where it replicates; `units` the places in the
    model's chain (see `stages.py`) that use it: two for a tied embedding, else one; `frozen` if it is not trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tp_dim: int | None
    units: tuple[int, ...]
    frozen: bool = False

    @property
    def kind(self) -> str:
        """One of STATE_KINDS, in the state of a model."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A box of a named tensor."""

    tensor: str
    box: Box


@dataclass(frozen=True)
class Atlas:
    """The pieces of every rank for a state (`specs`) under a layout, a pipeline schedule and a sharding over dp.

    Raises ValueError for an unknown sharding, and for one of ZeRO's with pp or tp above 1.
    """

    specs: tuple[TensorSpec, ...]
    layout: Layout
    schedule: str
    num_layers: int
    sharding: str = "rows"

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise ValueError(f"atlas: sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.sharding != "rows" and (self.layout.pp > 1 or self.layout.tp > 1):
            raise ValueError(f"atlas: sharding {self.sharding} needs pp 1 and tp 1, got {self.layout}; use rows")

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
        """Every non-empty box the rank holds, in the order of `specs`; those of a tensor in row-major order."""
        pp, dp, tp = self.layout.seat(rank)
        units = self.units(pp)
        here = (spec for spec in self.specs if not units.isdisjoint(spec.units))
        return tuple(Piece(spec.name, box) for spec in here for box in self._boxes(spec, dp, tp) if box.size)

    def owned(self, rank: int) -> tuple[Piece, ...]:
        """The rank's share to save: boxes that several ranks hold are split evenly among them along dim 0."""
        return tuple(piece for piece, _ in self.shares(rank))

    def shares(self, rank: int) -> Iterator[tuple[Piece, Piece]]:
        """Each owned piece, with the held one that it lies in."""
        for piece in self.held(rank):
            holders = self.holders(self.by_name[piece.tensor], rank)
            index = holders.index(rank)
            if not piece.box.shape:
                if index == 0:
                    yield piece, piece
                continue
            box = piece.box.cut(0, *even(piece.box.shape[0], len(holders), index))
            if box.size:
                yield Piece(piece.tensor, box), piece

    def holders(self, spec: TensorSpec, rank: int) -> Sequence[int]:
        """The ranks, ascending, that hold the same box of this tensor as `rank` does."""
        _, dp, tp = self.layout.seat(rank)
        stages = [p for p in range(self.layout.pp) if not self.units(p).isdisjoint(spec.units)]
        peers = range(self.layout.tp) if spec.tp_dim is None else (tp,)
        replicas = range(self.layout.dp) if not spec.shape and self.sharding == "rows" else (dp,)
        return [self.layout.rank(p, d, t) for p in stages for d in replicas for t in peers]

    def _boxes(self, spec: TensorSpec, dp: int, tp: int) -> list[Box]:
        if self.sharding != "rows":
            return boxes_of_range(spec.shape, *self.flats[spec.name].range_of(dp))
        box = Box.whole(spec.shape)
        if spec.tp_dim is not None:
            box = box.cut(spec.tp_dim, *chunk(box.shape[spec.tp_dim], self.layout.tp, tp))
        return [box.cut(0, *chunk(box.shape[0], self.layout.dp, dp)) if box.shape else box]

    @cached_property
    def flats(self) -> dict[str, Flat]:
        """Where every tensor lies in ZeRO's flat memory, by name."""
        found: dict[str, Flat] = {}
        for kind in dict.fromkeys(spec.kind for spec in self.specs):
            own = [(s.name, s.shape, s.frozen) for s in self.specs if s.kind == kind]
            found |= flats(own, parts=self.layout.dp, grouped=self.sharding == "groups")
        return found
