"""Interop by ranks: files as the ranks of another program hold them, both ways, by a pattern table.

    ranks.yaml                          degrees, shapes and the table of `fault_tolerance/checkpoints/patterns.py`
    pp0_dp0_tp0_ep0.safetensors         `<kind>/<parameter>` -> this rank's tensor, a file for every rank
    pp0_dp0_tp1_ep0.safetensors

    # ranks.yaml
    degrees: {pp: 2, dp: 1, tp: 2, ep: 1}
    extra: {step: 7, samples: 224}
    patterns: {'layers\\.\\d+\\.qkv\\.weight': 'fused(0, 64, 32, 32)', 'embed\\.weight': 'pad(0, 128) shard(0)', ...}
    shapes: {embed.weight: [50257, 768], ...}      of the whole parameters, without padding
    stages: {head.weight: [1], ...}                the pp ranks that hold a parameter; those not named: all of them

For programs with layouts of their own (fused q k v, padded vocabularies, ZeRO fragments): write its table once.

Rule of this file: files and names; what a rule means is for `patterns.py` to say, whether copies agree for `union.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from fault_tolerance.checkpoints.patterns import Op, Seat, assign
from fault_tolerance.checkpoints.union import gather, scatter
from framework.interop.exchange import Foreign, Lazy, Progress, parameters, silent, store, whole_tensor
from parallel.atlas import STATE_KINDS

TABLE = "ranks.yaml"


@dataclass(frozen=True, slots=True)
class Plan:
    """A `ranks.yaml`, checked: every parameter with its rules, shape and stages."""

    degrees: Mapping[str, int]
    extra: dict[str, Any]
    rules: Mapping[str, tuple[Op, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    stages: Mapping[str, tuple[int, ...]]

    def seats(self) -> Iterator[tuple[int, Seat, str]]:
        """Every rank: its stage, its seat, and the name of its file."""
        pp, dp, tp, ep = (self.degrees[axis] for axis in ("pp", "dp", "tp", "ep"))
        for p, d, t, e in itertools.product(range(pp), range(dp), range(tp), range(ep)):
            yield p, Seat(t, tp, d, dp, e, ep), f"pp{p}_dp{d}_tp{t}_ep{e}.safetensors"


def read_plan(file: Path, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Plan:
    """A checked `ranks.yaml`; `shapes` stands in for those that it leaves out. Raises ValueError for a wrong one."""
    if not file.is_file():
        raise ValueError(f"ranks: {file} must tell how the ranks hold the tensors, but does not exist")
    plain = yaml.safe_load(file.read_text()) or {}
    known = {"degrees", "extra", "patterns", "shapes", "stages"}
    if not isinstance(plain, dict) or not plain.keys() <= known or "patterns" not in plain:
        raise ValueError(
            f"ranks: {file} must have patterns, and may have {', '.join(sorted(known))}, got {list(plain)}"
        )
    whole = {name: tuple(shape) for name, shape in (plain.get("shapes") or shapes or {}).items()}
    if not whole:
        raise ValueError(f"ranks: {file} must tell the shapes of whole parameters, got none")
    degrees = {"pp": 1, "dp": 1, "tp": 1, "ep": 1} | plain.get("degrees", {})
    stages = {name: tuple(range(degrees["pp"])) for name in whole}
    stages |= {name: tuple(held) for name, held in plain.get("stages", {}).items()}
    return Plan(degrees, {"step": 0, **plain.get("extra", {})}, assign(plain["patterns"], whole), whole, stages)


def export(checkpoint: Checkpoint, directory: Path, *, table: Path, progress: Progress = silent) -> None:
    """Write the state as the ranks of the other program hold it. Raises ValueError if the table does not fit it."""
    plan = read_plan(table, shapes={name: spec.shape for name, spec in parameters(checkpoint).items()})
    directory.mkdir(parents=True, exist_ok=True)
    for stage, seat, file in plan.seats():
        tensors: dict[str, Tensor] = {}
        for name, ops in plan.rules.items():
            if stage in plan.stages[name]:
                for kind in STATE_KINDS:
                    part = scatter(ops, whole_tensor(checkpoint, f"{kind}/{name}").numpy(), seat)
                    tensors[f"{kind}/{name}"] = torch.from_numpy(part)
                    progress(part.nbytes)
        save_file(tensors, directory / file)
    plain = {
        "degrees": dict(plan.degrees),
        "extra": checkpoint.extra,
        "patterns": yaml.safe_load(table.read_text())["patterns"],
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "stages": {name: list(held) for name, held in plan.stages.items()},
    }
    (directory / TABLE).write_text(yaml.safe_dump(plain, sort_keys=False))


def read(directory: Path) -> Foreign:
    """Such a directory in our terms. Raises ValueError as `read_plan` does; reading a tensor, as `gather` does."""
    plan = read_plan(directory / TABLE)
    held = {file: _names(directory / file) for _, _, file in plan.seats()}
    tensors = {
        f"{kind}/{name}": Lazy(shape, _reader(directory, plan, kind, name))
        for kind in STATE_KINDS
        for name, shape in plan.shapes.items()
        if any(f"{kind}/{name}" in names for names in held.values())
    }
    if not any(name.startswith("param/") for name in tensors):
        raise ValueError(f"import: the files of {directory} must hold param/<name>, got none; see {TABLE}")
    return Foreign(tensors, {**plan.extra, "imported": {"format": "ranks", "path": str(directory)}})


def import_(directory: Path, target: str, *, progress: Progress = silent) -> Checkpoint:
    """Make a durable checkpoint of such a directory. Raises ValueError as `read` does."""
    return store(read(directory), target, progress=progress)


def _reader(directory: Path, plan: Plan, kind: str, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        parts = []
        for stage, seat, file in plan.seats():
            if stage in plan.stages[name]:
                with safe_open(directory / file, "pt") as reader:
                    parts.append((seat, reader.get_tensor(f"{kind}/{name}").float().numpy()))
        return torch.from_numpy(gather(plan.rules[name], plan.shapes[name], parts, name=f"{kind}/{name}"))

    return read


def _names(file: Path) -> set[str]:
    if not file.is_file():
        raise ValueError(f"import: {file} must be there, one for every rank; see {TABLE}")
    with safe_open(file, "pt") as reader:
        return set(reader.keys())
