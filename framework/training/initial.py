"""First weights: a function of (seed, tensor name, shape) alone, so every layout starts from the same bytes.

    whole tensor, cut into bands of whole rows of about a million elements each
    +------------------+
    | band 0           |   generator seeded by hash(seed, name, 0)
    | band 1   [ box ] |   hash(seed, name, 1)    a rank makes only the bands that its box touches,
    | band 2   [     ] |   hash(seed, name, 2)    and keeps its part of each
    +------------------+

Always made on the CPU, in fp32, so that a device does not change them either.

Rule of this file: no ranks, no layout: a box in, its values out.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from parallel.boxes import Box
from parallel.contract import HasInitial

BAND_ELEMENTS = 1 << 20


def initial_box(*, seed: int, name: str, shape: tuple[int, ...], box: Box, mean: float, std: float) -> Tensor:
    """The values of `box` of tensor `name`, fp32 on the CPU, drawn from a normal distribution."""
    if std == 0.0 or not box.size:
        return torch.full(box.shape, mean)
    out = torch.empty(box.shape)
    rows = max(1, BAND_ELEMENTS // max(1, math.prod(shape[1:])))
    for band in range(box.start[0] // rows, -(-box.stop[0] // rows)):
        whole = Box((band * rows,) + (0,) * (len(shape) - 1), (min(shape[0], (band + 1) * rows), *shape[1:]))
        wanted = whole.intersect(box)
        if wanted is not None:
            values = torch.empty(whole.shape).normal_(mean, std, generator=_generator(seed, name, band))
            out[wanted.within(box)] = values[wanted.within(whole)]
    return out


def default_rule(name: str, ndim: int) -> tuple[float, float]:
    """(mean, std) for a model that does not say: 1 for norms, 0 for other vectors, normal with 0.02 for matrices."""
    if ndim >= 2:
        return 0.0, 0.02
    return (1.0, 0.0) if name.endswith("weight") else (0.0, 0.0)


class InitialWeights:
    """The source of first weights for an engine: `weights(name, shape, box)`."""

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        """`model` may be on the meta device and is not kept changed; only its `initial`, if any, is asked."""
        self._model, self._seed = model, seed

    def __call__(self, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """Values of `box` of the parameter `name` (without a kind), fp32 on the CPU."""
        model = self._model
        mean, std = model.initial(name) if isinstance(model, HasInitial) else default_rule(name, len(shape))
        return initial_box(seed=self._seed, name=name, shape=shape, box=box, mean=mean, std=std)


def _generator(seed: int, name: str, band: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{band}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
