"""Derived values: every `null` of the config that means "follow from the others", filled in once, before decoding.

    optim.schedule_steps         num_steps
    optim.lr, global_batch, ...  the step law, from the model's size and num_steps (optim=step_law)
    layout.num_microbatches      2 pp with a pipeline, else 1
    cluster.max_nodes            num_nodes
    drill.faults[].node          a number n stands for the emulated node called n<n>

Rule of this file: plain values in and out. What is of a wrong type is left alone, for the door to refuse by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.training import step_law

_SHAPE = ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim")


def derive(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with nothing left to derive. Raises ValueError where the step law lacks what it needs."""
    tree = {key: dict(item) if isinstance(item, Mapping) else item for key, item in values.items()}
    optim, layout, cluster = (_group(tree, name) for name in ("optim", "layout", "cluster"))
    if "lr" in optim and optim["lr"] is None:
        _apply_step_law(optim, _group(tree, "model"), _group(tree, "data"))
    _fill(optim, "schedule_steps", optim.get("num_steps"))
    _fill(cluster, "max_nodes", cluster.get("num_nodes"))
    pp = layout.get("pp")
    _fill(layout, "num_microbatches", 2 * pp if isinstance(pp, int) and pp > 1 else 1)
    for fault in _faults(tree):
        if isinstance(fault.get("node"), int) and not isinstance(fault["node"], bool):
            fault["node"] = f"n{fault['node']}"
    return tree


def _faults(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies of the faults, which take the place of the originals."""
    drill = _group(tree, "drill")
    faults = drill.get("faults")
    if not isinstance(faults, list | tuple):
        return []
    drill["faults"] = [dict(fault) if isinstance(fault, Mapping) else fault for fault in faults]
    return [fault for fault in drill["faults"] if isinstance(fault, dict)]


def _apply_step_law(optim: dict[str, Any], model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    needed = {f"model.{key}": model.get(key) for key in _SHAPE}
    needed |= {"data.seq_len": data.get("seq_len"), "optim.num_steps": optim.get("num_steps")}
    batch = optim.get("global_batch")
    if batch is not None:
        needed["optim.global_batch"] = batch
    if not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in needed.values()):
        wrong = next(key for key, value in needed.items() if not isinstance(value, int) or value <= 0)
        raise ValueError(
            f"{wrong}: must be a positive integer for the step law, got {needed[wrong]!r}; or give optim.lr"
        )
    advice = step_law.advise(
        num_params=step_law.non_embedding_params(**{key: model[key] for key in _SHAPE}),
        seq_len=data["seq_len"],
        num_steps=optim["num_steps"],
        global_batch=batch,
    )
    for key in ("lr", "global_batch", "final_lr_ratio", "warmup_steps"):
        _fill(optim, key, getattr(advice, key))


def _group(tree: dict[str, Any], name: str) -> dict[str, Any]:
    group = tree.get(name)
    return group if isinstance(group, dict) else {}


def _fill(group: dict[str, Any], key: str, value: Any) -> None:
    if key in group and group[key] is None:
        group[key] = value
