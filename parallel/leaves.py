"""Leaves: the logical parameters of a rank, between the modules that compute with them and the optimizer.

    module parameters                    leaf                          slot
    plain | DTensor over dp, tp    ->    one per logical parameter ->  local fp32 shard and its moments

    a tied embedding      same rank (V placement): the later stage's parameter is a copy, refreshed after updates
                          two ranks: both update it, with gradients added in one order, so both stay equal to the bit

Rule of this file: it gathers gradients, it never scales or applies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.adamw import Slot
from parallel.atlas import Atlas, TensorSpec
from parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Leaf:
    """A logical parameter as this rank holds it.

    `copies` are the same parameter in later stages of this rank; `partner` is the rank of another stage that holds the
    same box of it; `counts` is true on exactly one of the ranks that hold the same box.
    """

    name: str
    parameter: nn.Parameter
    copies: tuple[nn.Parameter, ...]
    slot: Slot
    counts: bool
    partner: int | None


class Leaves:
    """All leaves of a rank."""

    def __init__(
        self, stages: Mapping[int, nn.Module], *, atlas: Atlas, aliases: Mapping[str, str], mesh: Mesh
    ) -> None:
        """`aliases`: tied names to the name their state bears."""
        self._mesh = mesh
        self._leaves = tuple(_find(stages, atlas, aliases, mesh))
        self.slots = {leaf.name: leaf.slot for leaf in self._leaves}
        self._gradients: dict[str, Tensor] | None = None

    @property
    def collected(self) -> bool:
        """Whether gradients were asked for since the last `discard`: then no more may be added."""
        return self._gradients is not None

    def trained(self) -> list[Slot]:
        """The slots that an optimizer updates."""
        return [leaf.slot for leaf in self._leaves if leaf.parameter.requires_grad]

    def gradients(self) -> list[tuple[Leaf, Tensor]]:
        """Each leaf's gradient, whole over microbatches, replicas, tp and ties, cut like its slot. None that is empty.

        Collective where a tie spans two ranks; the same tensors until `discard`.
        """
        if self._gradients is None:
            self._gradients = {}
            for leaf in self._leaves:
                gradient = _own_gradient(leaf)
                if leaf.partner is not None:
                    gradient = self._exchange(leaf, leaf.partner, gradient)
                if gradient is not None and gradient.numel():
                    self._gradients[leaf.name] = gradient
        return [(leaf, self._gradients[leaf.name]) for leaf in self._leaves if leaf.name in self._gradients]

    def discard(self) -> None:
        """Drop all gradients."""
        self._gradients = None
        for leaf in self._leaves:
            for parameter in (leaf.parameter, *leaf.copies):
                parameter.grad = None

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """After slots were written to, by an update or a load."""
        for leaf in self._leaves:
            for copy in leaf.copies:
                _local(copy).copy_(leaf.slot.param)

    def _exchange(self, leaf: Leaf, partner: int, gradient: Tensor | None) -> Tensor:
        """Add the other stage's gradient, the earlier stage's first."""
        mine = torch.zeros_like(leaf.slot.param) if gradient is None else gradient.contiguous()
        theirs = torch.empty_like(mine)
        if mine.numel():
            group = self._mesh.group("pp")
            operations = [dist.P2POp(dist.isend, mine, partner, group), dist.P2POp(dist.irecv, theirs, partner, group)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return mine + theirs if self._mesh.rank < partner else theirs + mine


def _find(stages: Mapping[int, nn.Module], atlas: Atlas, aliases: Mapping[str, str], mesh: Mesh) -> Iterator[Leaf]:
    found: dict[str, list[nn.Parameter]] = {}
    for module in stages.values():
        for local_name, parameter in module.named_parameters():
            found.setdefault(aliases.get(local_name, local_name), []).append(parameter)
    for name, (parameter, *copies) in found.items():
        spec = atlas.by_name[f"param/{name}"]
        yield Leaf(
            name,
            parameter,
            tuple(copies),
            _slot(parameter, decays=len(spec.shape) >= 2),
            counts=atlas.holders(spec, mesh.rank)[0] == mesh.rank,
            partner=_partner(spec, atlas, mesh),
        )


def _partner(spec: TensorSpec, atlas: Atlas, mesh: Mesh) -> int | None:
    pp, dp, tp = mesh.seat
    others = [p for p in range(mesh.layout.pp) if p != pp and not atlas.units(p).isdisjoint(spec.units)]
    return mesh.layout.rank(others[0], dp, tp) if others else None


def _slot(parameter: nn.Parameter, *, decays: bool) -> Slot:
    param = _local(parameter)
    return Slot(param, torch.zeros_like(param), torch.zeros_like(param), decays)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def _own_gradient(leaf: Leaf) -> Tensor | None:
    total: Tensor | None = None
    for parameter in (leaf.parameter, *leaf.copies):
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            assert isinstance(parameter, DTensor)
            gradient = gradient.redistribute(placements=parameter.placements).to_local()
        total = gradient if total is None else total + gradient
    return total
