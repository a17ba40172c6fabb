"""Interop: what every exchange with another tool's checkpoints has in common.

    theirs  --names, shapes, lazy tensors-->  Foreign  --store-->  a durable checkpoint  --any layout-->  a run
    ours    --whole tensors, one at a time-->                      their files

Tensors pass one at a time, so that memory holds one of them and never the state. What is not a tensor comes along in
the checkpoint's `extra`; what an origin has not (moments, in weights alone) starts at zero, as in a new run.

Rule of this file: it knows our side only; each other side has a file of its own, `interop_<name>.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fault_tolerance.checkpoints.checkpoint import Checkpoint, commit
from fault_tolerance.checkpoints.shard import write_shard
from framework.model import Decoder
from parallel.assemble import meta
from parallel.atlas import STATE_KINDS, Piece, TensorSpec
from parallel.boxes import Box
from parallel.contract import unit_of
from parallel.tensor import tp_dim

Progress = Callable[[int], None]
MODEL_KEYS = ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "rope_theta", "norm_eps", "tie_embeddings")


def silent(num_bytes: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor of another tool's checkpoint, read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of it in fp32."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Another tool's checkpoint in our terms: `<kind>/<parameter>` -> tensor, and the rest as JSON."""

    tensors: Mapping[str, Lazy]
    extra: dict[str, Any]


def store(foreign: Foreign, directory: str, *, progress: Progress = silent) -> Checkpoint:
    """Write a foreign state as a durable checkpoint: fp32, with zeros for moments that the origin has not.

    Raises ValueError when shapes contradict each other.
    """
    shapes = {name.partition("/")[2]: lazy.shape for name, lazy in foreign.tensors.items() if name.startswith("param/")}
    specs = specs_of(shapes)
    for spec in specs:
        lazy = foreign.tensors.get(spec.name)
        if lazy is not None and lazy.shape != spec.shape:
            raise ValueError(f"import: {spec.name} must have its parameter's shape {spec.shape}, got {lazy.shape}")

    def reader(spec: TensorSpec) -> Callable[[], Tensor]:
        def read() -> Tensor:
            lazy = foreign.tensors.get(spec.name)
            whole = torch.zeros(spec.shape) if lazy is None else lazy.read().to(torch.float32).contiguous()
            progress(0 if lazy is None else whole.nbytes)
            return whole

        return read

    pieces = [(Piece(spec.name, Box.whole(spec.shape)), reader(spec)) for spec in specs]
    return commit(
        directory, [write_shard(directory, "imported", pieces, specs=specs)], specs=specs, extra=foreign.extra
    )


def specs_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    """The specs of a state with these parameters. What tensor parallelism cuts is known for our own model's names."""
    num_layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    template = meta(lambda: Decoder(vocab_size=2, num_layers=num_layers, dim=2, num_heads=1, num_kv_heads=1, ffn_dim=2))
    ours = set(shapes) <= {name for name, _ in template.named_parameters()}

    def spec(kind: str, name: str, shape: tuple[int, ...]) -> TensorSpec:
        dim = tp_dim(template, name) if ours else None
        units = {unit_of(name, num_layers)} if ours else set()
        if ours and name == "embed.weight" and "head.weight" not in shapes:
            units.add(num_layers + 1)
        return TensorSpec(f"{kind}/{name}", shape, "float32", dim, tuple(sorted(units)))

    return tuple(spec(kind, name, shape) for kind in STATE_KINDS for name, shape in shapes.items())


def parameters(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The parameters of a checkpoint, by their own names."""
    return {s.name.removeprefix("param/"): s for s in checkpoint.specs if s.name.startswith("param/")}


def whole_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A whole tensor of the state, by its name `<kind>/<parameter>`."""
    spec = checkpoint.index.by_name[name]
    out = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    checkpoint.read_into({Piece(name, Box.whole(spec.shape)): out})
    return out


def model_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of our own model that the checkpoint was saved from.

    Raises ValueError if its config does not tell them.
    """
    model = checkpoint.extra.get("config", {}).get("model", {})
    missing = [key for key in MODEL_KEYS if key not in model]
    if missing:
        raise ValueError(
            f"checkpoint {checkpoint.path}: extra.config.model must tell {', '.join(missing)}, got none; "
            "only a model of framework.model.Decoder can be exported to this format"
        )
    vocab_size = parameters(checkpoint)["embed.weight"].shape[0]
    return {"vocab_size": vocab_size, **{key: model[key] for key in MODEL_KEYS}}


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head uses the embedding's weight."""
    names = parameters(checkpoint)
    return "embed.weight" in names and "head.weight" not in names
