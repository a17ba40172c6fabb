"""Assemble: from a model that knows one device to the stage module that a rank runs.

    meta device             prune to the stage's units -> cut by tp -> tie again
    then layer by layer     checkpointing -> compile
    then bucket by bucket   memory on the device -> FSDP

so the most that is ever on the device beyond the rank's own shards is one bucket of layers, whatever the model's size.

Rule of this file: it wires parts of the neighbouring files together in the one order that works. Values of
parameters are zero here; whoever has them fills them in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from parallel.checks import Wrapping
from parallel.contract import HasBuffers, unit_of
from parallel.data import needs_fsdp, shard_unit
from parallel.mesh import Mesh
from parallel.specs import Tie
from parallel.stages import buckets
from parallel.tensor import apply_tensor_parallel


def assemble_stage(
    build: Callable[[], nn.Module], *, units: Iterable[int], ties: tuple[Tie, ...], mesh: Mesh, wrapping: Wrapping
) -> nn.Module:
    """The module of one stage, on the mesh's device, parameters zero and fp32."""
    model = meta(build)
    prune(model, frozenset(units))
    if mesh.layout.tp > 1:
        apply_tensor_parallel(model, mesh.axis("tp"), sequence_parallel=wrapping.sequence_parallel)
        tie_again(model, ties)
    shard = functools.partial(
        shard_unit,
        mesh=mesh.axis("dp"),
        precision=wrapping.precision,
        reshard_after_forward=wrapping.reshard_after_forward,
    )
    wanted = needs_fsdp(dp=mesh.layout.dp, precision=wrapping.precision)
    layers = list(model.layers.values())  # type: ignore[union-attr, operator]
    for layer in layers:
        _wrap_layer(layer, wrapping)
    for bucket in buckets([_local_bytes(layer) for layer in layers], wrapping.bucket_bytes) if wanted else ():
        members = layers[bucket.start : bucket.stop]
        for layer in members:
            materialise(layer, mesh.device)
        shard(members)
    materialise(model, mesh.device)
    if isinstance(model, HasBuffers):
        model.reset_buffers()
    if wanted:
        shard([model])
    return model


def assemble_whole(build: Callable[[], nn.Module], *, device: torch.device, wrapping: Wrapping) -> nn.Module:
    """The whole model on one device, parameters zero and fp32; nothing is cut."""
    model = meta(build)
    materialise(model, device)
    for layer in model.layers.values():  # type: ignore[union-attr, operator]
        _wrap_layer(layer, wrapping)
    if isinstance(model, HasBuffers):
        model.reset_buffers()
    return model


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The whole model without memory."""
    with torch.device("meta"):
        return build()


def prune(model: nn.Module, units: frozenset[int]) -> None:
    """Take away the parts of a whole model that are not in `units` of the chain."""
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    num_layers = len(layers)
    for part in ("embed", "norm", "head"):
        if unit_of(part, num_layers) not in units:
            setattr(model, part, None)
    for name in list(layers):
        if unit_of(f"layers.{name}", num_layers) not in units:
            del layers[name]


def tie_again(model: nn.Module, ties: tuple[Tie, ...]) -> None:
    """Make the parameter of each alias the one of its name, where both are here."""
    for tie in ties:
        source, target = _owner(model, tie.name), _owner(model, tie.alias)
        if source is not None and target is not None:
            setattr(target, tie.alias.rpartition(".")[2], getattr(source, tie.name.rpartition(".")[2]))


def _owner(model: nn.Module, parameter_name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in parameter_name.split(".")[:-1]:
        module = None if module is None else getattr(module, part, None)
    return module


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer that is on the meta device zeroed memory on `device`. Ties stay."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_zeros(parameter, device), parameter.requires_grad)
                setattr(owner, name, made[id(parameter)])
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                owner.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def _local_bytes(module: nn.Module) -> int:
    """What its parameters take in fp32 on a rank that has them whole but for tp."""
    return sum(4 * (p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())


def _zeros(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """fp32: the master copy, whatever the model's constructor chose."""
    if not isinstance(like, DTensor):
        return torch.zeros(like.shape, dtype=torch.float32, device=device)
    local = torch.zeros(like.to_local().shape, dtype=torch.float32, device=device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _wrap_layer(layer: nn.Module, wrapping: Wrapping) -> None:
    """Both replace the layer's forward in place, so that no parameter changes its name.

    Checkpointing goes around the compiled forward: compiled the other way round, torch quietly runs it uncompiled.
    """
    forward = layer.forward
    if wrapping.compile:
        forward = torch.compile(forward)
    if wrapping.activation_checkpointing:
        forward = functools.partial(checkpoint, forward, use_reentrant=False)
    if wrapping.compile or wrapping.activation_checkpointing:
        layer.forward = forward  # type: ignore[method-assign]
