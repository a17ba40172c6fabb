"""What the ranks of a test of the DeepSpeed engine do, beside what those of any engine do (`ranks.py`)."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from parallel.boxes import Box
from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.parallel.ranks import Job, engine_for, step_once


def what_deepspeed_holds(store: Store, rank: int, generation: int, jobs: list[Job]) -> list[str]:
    """Compare `state()` with what DeepSpeed's own public accessors give. Returns differences."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(jobs[0].layout), generation=generation, timeout_s=60)
    found = []
    for job in jobs:
        engine = engine_for(job, mesh)
        engine.initialise(numbered)
        found += [f"{job.zero} param {name}" for name, p in engine._model.named_parameters() if not _is_numbered(p, mesh)]
        step_once(job, mesh, engine, 1)
        found += [f"{job.zero} {what}" for what in _differences(engine)]
        engine.close()
    mesh.close()
    return found


def numbered(name: str, shape: tuple[int, ...], box: Box) -> Tensor:
    """Weights that say where they belong."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)[box.within(Box.whole(shape))] / 1e6


def _is_numbered(parameter: Tensor, mesh: Mesh) -> bool:
    """Whether a parameter that computes holds what `state()` was told: whole, or ZeRO-3's part of it."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    whole = numbered("", shape, Box.whole(shape)).flatten()
    if not hasattr(parameter, "ds_tensor"):
        return torch.equal(parameter.detach().flatten(), whole)
    part = -(-whole.numel() // mesh.layout.dp)
    mine = whole[mesh.seat[1] * part : (mesh.seat[1] + 1) * part]
    return torch.equal(parameter.ds_tensor.detach()[: mine.numel()], mine)


def _differences(engine) -> list[str]:  # type: ignore[no-untyped-def]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    theirs = {}
    for name, parameter in engine._model.named_parameters():
        if parameter.requires_grad:
            theirs[f"param/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                theirs[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
    ours = engine.state()
    wrong = [
        f"{piece.tensor} {piece.box}"
        for piece, tensor in ours.items()
        if piece.tensor in theirs
        and not torch.equal(
            tensor, theirs[piece.tensor].reshape(engine.atlas.by_name[piece.tensor].shape)[
                piece.box.within(Box.whole(engine.atlas.by_name[piece.tensor].shape))
            ],
        )
    ]  # fmt: skip
    wrong += [f"{p.tensor}: not contiguous fp32" for p, t in ours.items() if not t.is_contiguous() or t.dtype != torch.float32]
    return wrong + ["the pieces are not those of the atlas"] * (list(ours) != list(engine.atlas.held(engine._mesh.rank)))


def what_stays_behind(store: Store, rank: int, generation: int, job: Job, cycles: int) -> list[str]:
    """Build, train and close again and again, the store's generations apart; returns what was not let go."""
    kept = []
    for cycle in range(cycles):
        number = generation * 1000 + cycle
        mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=number, timeout_s=60)
        engine = engine_for(job, mesh)
        step_once(job, mesh, engine, 1)
        watched = [weakref.ref(engine._engine), weakref.ref(engine._model), weakref.ref(engine._optimizer)]
        watched += [weakref.ref(parameter) for parameter in engine._model.parameters()]
        engine.close()
        del engine
        mesh.close()
        kept += [f"cycle {cycle}: {type(ref()).__name__}" for ref in watched if ref() is not None]
    return kept
