"""The contract between a model and `parallel/`: what an `nn.Module` must have to be trained here.

    embed    tokens (B, T) -> stream (B, T, D)              any of these may be set to None and
    layers   nn.ModuleDict "0".."L-1", stream -> stream     layers may be deleted: `forward` skips
    norm     stream -> stream                               what is gone, and takes the stream
    head     stream -> logits (B, T, V)                     instead of tokens where `embed` is

With that, and `dim` (the width D), a model runs under any pp and dp. For tp it also says `tp_plan()`. It is built on
the meta device, so its constructor must not read values; parameters get their first values from `initial(name)`
if it has that, else by the rule of `framework.training.initial`. Every parameter belongs to one of the four attributes; one may be
tied between two of them. Buffers must be a function of the configuration: `reset_buffers()` makes them again.

Rule of this file: it only says what a model must be, and refuses one that is not, in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

PARTS = ("embed", "layers", "norm", "head")


class PipelineModel(Protocol):
    """The least that a model must have. Also `tp_plan`, `initial` and `reset_buffers`, see below."""

    dim: int
    embed: nn.Module | None
    layers: nn.ModuleDict
    norm: nn.Module | None
    head: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or the stream, to the stream or logits, through the parts that are there."""


@runtime_checkable
class HasPlan(Protocol):
    """A model that can be cut by tensor parallelism.

    `column_kv` styles also need `num_heads` and `num_kv_heads`.
    """

    def tp_plan(self) -> Mapping[str, str]:
        """Pattern of module names (fnmatch, `*` stands for a layer) to a style of `parallel.tensor.STYLES`."""


@runtime_checkable
class HasInitial(Protocol):
    """A model that chooses the distribution of its first weights."""

    def initial(self, name: str) -> tuple[float, float]:
        """(mean, standard deviation) of the parameter of this name."""


@runtime_checkable
class HasBuffers(Protocol):
    """A model with buffers. They are no state: they are made again wherever the model is."""

    def reset_buffers(self) -> None:
        """Fill every buffer, on the device where it now is."""


def check_model(model: nn.Module, *, tp: int = 1) -> None:
    """Refuse what breaks the contract. Raises ValueError that names the model's class and what is missing."""
    name = type(model).__name__
    missing = [part for part in (*PARTS, "dim") if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"model {name}: must have {', '.join(PARTS)} and dim, got none of {', '.join(missing)}; "
            "see parallel/contract.py"
        )
    _check_layers(name, model.layers)
    strangers = {key.split(".")[0] for key, _ in model.named_parameters()} - set(PARTS)
    if strangers:
        raise ValueError(
            f"model {name}: parameters must belong to {', '.join(PARTS)}, got some under "
            f"{', '.join(sorted(strangers))}; move them into one of the four"
        )
    for key, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"model {name}: parameter {key} must have a dimension, got a scalar; make it shape (1,)")
    if any(True for _ in model.buffers()) and not isinstance(model, HasBuffers):
        raise ValueError(f"model {name}: has buffers, so it must have reset_buffers() to make them; write that method")
    if tp > 1 and not isinstance(model, HasPlan):
        raise ValueError(f"layout.tp: must be 1 for model {name}, which has no tp_plan(), got {tp}; write tp_plan()")


def _check_layers(name: str, layers: object) -> None:
    if not isinstance(layers, nn.ModuleDict) or list(layers) != [str(i) for i in range(len(layers))]:
        got = list(layers) if isinstance(layers, nn.ModuleDict) else type(layers).__name__
        raise ValueError(f'model {name}: layers must be an nn.ModuleDict with keys "0", "1", ..., got {got}; rename')


def unit_of(name: str, num_layers: int) -> int:
    """The unit of the chain (see `stages.py`) that a parameter's or module's name belongs to."""
    part, _, rest = name.partition(".")
    if part == "layers":
        return int(rest.split(".")[0]) + 1
    return 0 if part == "embed" else num_layers + 1
