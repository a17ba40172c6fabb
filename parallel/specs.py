"""Specs: what the training state of a model is, read off a model on the meta device.

    model + its tp_plan  ->  a TensorSpec for each parameter and each of its two Adam moments

The specs are the same for every layout; `atlas.py` cuts them. A tied parameter is listed once, under the name that
comes first in the chain, with the units of all its uses.

Rule of this file: it looks at names and shapes; it builds and cuts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from parallel.atlas import STATE_KINDS, TensorSpec
from parallel.contract import unit_of
from parallel.tensor import tp_dim


@dataclass(frozen=True, slots=True)
class Tie:
    """A parameter that is used under two names: `name` is the one that its state bears."""

    name: str
    alias: str


def ties(model: nn.Module) -> tuple[Tie, ...]:
    """The tied parameters of a whole model, in the order of the aliases."""
    first: dict[int, str] = {}
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found.append(Tie(first[id(parameter)], name))
    return tuple(found)


def state_specs(model: nn.Module) -> tuple[TensorSpec, ...]:
    """The specs of the whole state: all parameters, then all `exp_avg`, then all `exp_avg_sq`.

    Every tensor of the state is fp32. Raises ValueError if a parameter is tied more than once, or the plan of the
    model names an unknown style.
    """
    num_layers = len(model.layers)  # type: ignore[arg-type]
    uses: dict[str, tuple[str, ...]] = {name: (name,) for name, _ in model.named_parameters()}
    for tie in ties(model):
        if len(uses[tie.name]) > 1:
            raise ValueError(f"model {type(model).__name__}: {tie.name} must be tied once at most, got {tie.alias} too")
        uses[tie.name] += (tie.alias,)
    return tuple(
        TensorSpec(
            name=f"{kind}/{name}",
            shape=tuple(parameter.shape),
            dtype="float32",
            tp_dim=tp_dim(model, name),
            units=tuple(sorted({unit_of(use, num_layers) for use in uses[name]})),
            frozen=not parameter.requires_grad,
        )
        for kind in STATE_KINDS
        for name, parameter in model.named_parameters()
    )
