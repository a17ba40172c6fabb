"""Interop with DeepSpeed's universal checkpoints (format 0.4), both ways, with torch alone.

    target/latest_universal                                 names the folder below
    target/global_step123_universal/
      mp_rank_00_model_states.pt                            counters, and our `extra`  (the name ZeRO-1 and 2 look for)
      zero_pp_rank_0_mp_rank_00_model_states.pt             the same                   (the name ZeRO-3 looks for)
      zero/optimizer_state.pt                               what either optimizer asks for
      zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt         {"param": the whole tensor, "cat_dim": 0 or 1}
      zero/<parameter>/step.pt

What we export is a superset: whole shapes, which ZeRO-3 flattens itself, and both optimizer layouts. So one export
loads into ZeRO-1, 2 and 3 alike, which DeepSpeed's own converter cannot do. Its param groups are left empty: a rate
or a decay of ours must not replace what the engine was configured with, group by group.

Rule of this file: deepspeed is not imported. Its files are read by torch's restricted loader; classes of its own that
lie in them become stand-ins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop.exchange import Foreign, Lazy, Progress, parameters, silent, store, whole_tensor
from framework.interop.unpickling import Standin, load_torch

VERSION = "0.19.8"
KINDS = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # ours: theirs
EXTRA = "holdfast_extra"
_PLAIN = (None, False, 1)
MAX_GROUPS = 64  # param groups that an engine may have; it reads as many as it has itself
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_STAND_IN = dict.fromkeys(
    (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "argparse.Namespace",
    ),
    Standin,
)


def export(checkpoint: Checkpoint, directory: Path, *, progress: Progress = silent) -> None:
    """Write a universal checkpoint that an engine with `load_universal` takes by `engine.load_checkpoint(directory)`."""
    tag = f"global_step{checkpoint.step}_universal"
    folder = directory / tag
    for name, spec in parameters(checkpoint).items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for ours, theirs in KINDS.items():
            tensor = whole_tensor(checkpoint, f"{ours}/{name}").float()
            torch.save({"param": tensor, "cat_dim": spec.tp_dim or 0}, place / f"{theirs}.pt")
            progress(tensor.nbytes)
        torch.save(torch.tensor(float(checkpoint.step)), place / "step.pt")
    torch.save(_optimizer_state(checkpoint.step), folder / "zero" / "optimizer_state.pt")
    states = _model_states(checkpoint)
    for file in MODEL_STATES:
        torch.save(states, folder / file)
    (directory / "latest_universal").write_text(tag)


def read(directory: Path) -> Foreign:
    """A universal checkpoint in our terms; `directory` holds `latest_universal`, or is the folder that it names.

    Raises ValueError if it is none, or holds what our state has not (experts, fused parameters).
    """
    folder = _folder(directory)
    states = _first_states(folder)
    shapes = _shapes(states)
    tensors: dict[str, Lazy] = {}
    for place in sorted(path.parent for path in (folder / "zero").rglob("fp32.pt")):
        name = ".".join(place.relative_to(folder / "zero").parts)
        for ours, theirs in KINDS.items():
            if (place / f"{theirs}.pt").is_file():
                tensors[f"{ours}/{name}"] = _lazy(place / f"{theirs}.pt", shapes.get(name))
    if not tensors:
        raise ValueError(f"import: {folder} must hold zero/<parameter>/fp32.pt, got none; convert with ds_to_universal")
    extra = json.loads(states[EXTRA]) if EXTRA in states else {}
    extra.setdefault("samples", int(states.get("global_samples", 0)))
    extra |= {"step": _step(folder, states), "imported": {"format": "deepspeed", "path": str(directory)}}
    return Foreign(tensors, extra)


def import_(directory: Path, target: str, *, progress: Progress = silent) -> Checkpoint:
    """Make a durable checkpoint of a universal checkpoint. Raises ValueError as `read` does."""
    return store(read(directory), target, progress=progress)


def _optimizer_state(step: int) -> dict[str, Any]:
    """What the optimizers of ZeRO-1 and 2 (first two keys) and of ZeRO-3 (the last) look for."""
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(MAX_GROUPS)]
    own = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": groups}
    return {"ds_version": VERSION, "param_groups": groups, "optimizer_state_dict": own}


def _model_states(checkpoint: Checkpoint) -> dict[str, Any]:
    """The counters that an engine takes over; whatever else is here, it hands to its caller as client state."""
    shapes = {name: torch.Size(spec.shape) for name, spec in parameters(checkpoint).items()}
    return {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "param_shapes": [shapes],
        "buffer_names": [],
        "global_steps": checkpoint.step,
        "global_samples": checkpoint.extra.get("samples", 0),
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        EXTRA: json.dumps(checkpoint.extra),
    }


def _folder(directory: Path) -> Path:
    latest = directory / "latest_universal"
    folder = directory / latest.read_text().strip() if latest.is_file() else directory
    if not (folder / "zero").is_dir():
        raise ValueError(
            f"import: {directory} must be a DeepSpeed universal checkpoint, got no latest_universal or zero/"
        )
    return folder


def _first_states(folder: Path) -> Mapping[str, Any]:
    """One of the files of model states: they differ by rank, and not in what is needed here."""
    for file in sorted(folder.glob("*mp_rank_*_model_states.pt")):
        states: Mapping[str, Any] = load_torch(file, stand_in=_STAND_IN)
        return states
    return {}


def _shapes(states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name, which the flat tensors of ZeRO-3 have lost."""
    groups = states.get("param_shapes") or []
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _lazy(file: Path, shape: tuple[int, ...] | None) -> Lazy:
    tensor = _tensor(file)
    return Lazy(tuple(tensor.shape) if shape is None else shape, _reader(file, shape))


def _reader(file: Path, shape: tuple[int, ...] | None) -> Callable[[], Tensor]:
    return lambda: _tensor(file) if shape is None else _tensor(file).reshape(shape)


def _tensor(file: Path) -> Tensor:
    found = load_torch(file, stand_in=_STAND_IN)
    if isinstance(found, Tensor):
        return found
    strange = [
        key for key in ("is_expert_param", "sub_param_shape", "param_n_sub_params") if found.get(key, 1) not in _PLAIN
    ]
    if strange:
        raise ValueError(f"import: {file} must be a plain tensor for our model, got one with {', '.join(strange)}")
    tensor: Tensor = found["param"]
    return tensor


def _step(folder: Path, states: Mapping[str, Any]) -> int:
    """Optimizer steps taken: of any parameter, else of the optimizer, else the engine's counter less what it skipped."""
    for file in (folder / "zero").rglob("step.pt"):
        return int(load_torch(file))
    file = folder / "zero" / "optimizer_state.pt"
    if file.is_file():
        own = load_torch(file, stand_in=_STAND_IN).get("optimizer_state_dict", {}).get("state", {}).get(0, {})
        if "step" in own:
            return int(own["step"])
    return int(states.get("global_steps", 0)) - int(states.get("skipped_steps", 0))
