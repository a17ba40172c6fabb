"""Tensor parallelism: a model's plan, a table of patterns to styles, put into effect with DTensor.

    style       what it is                     weight cut along   in  -> out (SP: with sequence parallel)
    embedding   vocabulary-parallel lookup     0 (vocabulary)     tokens -> stream
    norm        sequence-parallel norm         not cut            stream -> stream
    gather      block whose input is gathered  -                  stream -> whole sequence on every rank
    column      linear, outputs cut            0                  whole  -> my slice of the features
    column_kv   the same for keys and values   0                  whole  -> the heads that my queries need
    row         linear, inputs cut             1                  my slice -> stream (reduced)
    head        linear onto the vocabulary     0                  stream -> logits, cut along the vocabulary

    stream: cut along the sequence with sequence parallel, else the same on every rank

Fewer key and value heads than tp, or any number that does not fit, needs no copies of weights: `column_kv` cuts the
weight like any other, gathers the small outputs, and each rank keeps the heads its queries use. The gradient of
what it kept is a partial sum, which the gather's backward reduces and scatters.

Sources: Megatron-LM (arXiv 1909.08053; 2205.05198 for sequence parallel), `torch.distributed.tensor.parallel`.

Rule of this file: it knows styles, not models; a model names its modules in `tp_plan`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from parallel.contract import HasPlan

WEIGHT_DIM: Mapping[str, int | None] = {
    "embedding": 0,
    "norm": None,
    "gather": None,
    "column": 0,
    "column_kv": 0,
    "row": 1,
    "head": 0,
}
STYLES = tuple(WEIGHT_DIM)

# It warns, on every step, that a redistribution is not the cheapest conceivable one.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def style_of(model: nn.Module, module_name: str) -> str | None:
    """The style the model's plan gives a module, None where it gives none. Raises ValueError for an unknown style."""
    plan = model.tp_plan() if isinstance(model, HasPlan) else {}
    for pattern, style in plan.items():
        if fnmatchcase(module_name, pattern) and pattern.count(".") == module_name.count("."):
            if style not in STYLES:
                raise ValueError(f"tp_plan {pattern}: style must be one of {', '.join(STYLES)}, got {style!r}; fix it")
            return style
    return None


def tp_dim(model: nn.Module, parameter_name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter, None where every rank has all of it."""
    module_name, _, leaf = parameter_name.rpartition(".")
    style = style_of(model, module_name)
    if style is None:
        return None
    if leaf == "bias":
        return 0 if style in ("column", "column_kv", "head") else None
    return WEIGHT_DIM[style]


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Cut a model, or a stage of it, on the meta device, over a one-dimensional mesh, as its plan says.

    Tied parameters come untied: tie them again afterwards. No communication. Raises ValueError for an unknown style.
    """
    for name, module in list(model.named_modules()):
        style = style_of(model, name)
        parallel = None if style is None else _style(model, style, mesh, sequence_parallel=sequence_parallel)
        if parallel is not None:
            parallelize_module(module, mesh, parallel, src_data_rank=None)


def _style(model: nn.Module, style: str, mesh: DeviceMesh, *, sequence_parallel: bool) -> ParallelStyle | None:
    stream = Shard(1) if sequence_parallel else Replicate()
    if style == "embedding":
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if style == "norm":
        return SequenceParallel(use_local_output=True) if sequence_parallel else None
    if style == "gather":
        return PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
    if style == "column":
        return ColwiseParallel()
    if style == "row":
        return RowwiseParallel(output_layouts=stream)
    if style == "head":
        return ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)
    return _key_value_style(int(model.num_heads), int(model.num_kv_heads), mesh)  # type: ignore[arg-type]


def _key_value_style(num_heads: int, num_kv_heads: int, mesh: DeviceMesh) -> ParallelStyle:
    if num_kv_heads % mesh.size() == 0:
        return ColwiseParallel()
    heads = heads_of_rank(num_heads, num_kv_heads, tp=mesh.size(), rank=mesh.get_local_rank())
    return GatheredHeads(heads, num_kv_heads=num_kv_heads)


def heads_of_rank(num_heads: int, num_kv_heads: int, *, tp: int, rank: int) -> tuple[int, ...]:
    """The key and value heads for a rank's query heads, in their order.

    Each once where every one of them serves equally many of the rank's queries, side by side, as grouped-query
    attention wants them; else one for each query head.
    """
    group, mine = num_heads // num_kv_heads, num_heads // tp
    per_query = [query // group for query in range(rank * mine, (rank + 1) * mine)]
    distinct = sorted(set(per_query))
    share = mine // len(distinct)
    fits = [head for head in distinct for _ in range(share)] == per_query
    return tuple(distinct if fits else per_query)


class GatheredHeads(ColwiseParallel):
    """Column parallel, whose outputs are gathered over tp, and of which a rank then keeps some heads."""

    def __init__(self, heads: tuple[int, ...], *, num_kv_heads: int) -> None:
        super().__init__(output_layouts=Replicate(), use_local_output=False)
        self._heads, self._num_kv_heads = heads, num_kv_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(self._keep)
        return module

    def _keep(self, module: nn.Module, inputs: object, output: DTensor) -> Tensor:
        whole = output.to_local(grad_placements=[Partial()])
        width = whole.shape[-1] // self._num_kv_heads
        return torch.cat([whole.narrow(-1, head * width, width) for head in self._heads], dim=-1)
