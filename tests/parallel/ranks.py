"""What the ranks of a test do. Imported by the parent of all of them, so torch is loaded once."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.distributed.pipelining  # noqa: F401  loaded before the fork
from torch import nn
from torch._C._distributed_c10d import Store
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from framework.model import Decoder
from framework.training.initial import InitialWeights
from parallel.assemble import meta
from parallel.atlas import STATE_KINDS, Piece
from parallel.boxes import Box
from parallel.checks import Wrapping
from parallel.deepspeed_engine import DeepSpeedEngine, Zero
from parallel.engine import Engine, EngineOptions, FsdpEngine
from parallel.layout import Layout
from parallel.mesh import Mesh

torch.set_num_threads(1)
WHOLE = os.environ.get("HOLDFAST_WHOLE") == "1"  # every layout with every schedule, and longer

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "num_layers": 4,
    "dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 176,
}


# Adam's first step is lr * g / (|g| + eps): where a gradient happens to be as small as its own rounding, layouts differ
# by a good part of lr. Later steps are divided by a past that is not. Hence the warm-up, here as in the product.
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Job:
    """A training run in a test. `samples` of the global batch; each replica's share is padded to its microbatches."""

    layout: str = "1x1x1"
    schedule: str = "1f1b"
    num_microbatches: int = 2
    steps: int = 2
    samples: int = 8
    seq_len: int = 64
    model: dict[str, Any] = field(default_factory=lambda: dict(TINY))
    target: type[nn.Module] = Decoder
    wrapping: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-3
    clip: float = 1.0
    seed: int = 7
    zero: dict[str, Any] | None = None  # of DeepSpeed; None: FSDP2
    shares: tuple[int, ...] = ()  # samples of each replica in every other step, if not all alike

    @property
    def world(self) -> int:
        """Number of ranks."""
        return Layout.parse(self.layout).world

    def but(self, **changes: Any) -> Job:
        """This job, changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Trained:
    """What a rank says of a run: losses and gradient norms by step, its pieces of the final state."""

    losses: list[float]
    norms: list[float]
    val_loss: float
    pieces: dict[Piece, np.ndarray]


def batch(job: Job, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step: a noisy arithmetic sequence, so that there is something to learn."""
    generator = torch.Generator().manual_seed(job.seed * 1000 + step)
    vocab = job.model["vocab_size"]
    start = torch.randint(vocab, (job.samples, 1), generator=generator)
    stride = torch.randint(1, 4, (job.samples, 1), generator=generator)
    noise = (torch.rand(job.samples, job.seq_len + 1, generator=generator) < 0.05).long()
    tokens = (start + stride * torch.arange(job.seq_len + 1) + noise) % vocab
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def share(job: Job, layout: Layout, dp: int, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A replica's samples, padded with ignored ones to a multiple of the microbatches, equally on all replicas if shares are."""
    each = job.shares[dp] if job.shares else -(-job.samples // layout.dp)
    each = -(-each // job.num_microbatches) * job.num_microbatches
    mine = slice(sum(job.shares[:dp]), sum(job.shares[: dp + 1])) if job.shares else slice(dp * each, (dp + 1) * each)
    tokens, labels = tokens[mine], labels[mine]
    missing = each - tokens.shape[0]
    return (
        torch.cat([tokens, tokens.new_zeros(missing, job.seq_len)]),
        torch.cat([labels, labels.new_full((missing, job.seq_len), -100)]),
    )


def engine_for(job: Job, mesh: Mesh) -> Engine:
    """The engine of a job, with its first weights."""
    build = functools.partial(job.target, **job.model)
    wrapping = Wrapping(**job.wrapping)
    options = EngineOptions(schedule=job.schedule, num_microbatches=job.num_microbatches, wrapping=wrapping)
    engine: Engine
    if job.zero is None:
        engine = FsdpEngine(build, mesh=mesh, options=options)
    else:
        engine = DeepSpeedEngine(build, mesh=mesh, options=options, zero=Zero(**job.zero))
    engine.initialise(InitialWeights(meta(build), seed=job.seed))
    return engine


def step_once(job: Job, mesh: Mesh, engine: Engine, step: int) -> tuple[float, float]:
    """One optimizer step: (loss, gradient norm), equal on all ranks."""
    alike = job if step % 2 == 0 else job.but(shares=())
    tokens, labels = share(alike, mesh.layout, mesh.seat[1], *batch(job, step))
    num_tokens = job.samples * job.seq_len
    loss = engine.forward_backward(tokens, labels, num_tokens=num_tokens)
    sums = mesh.sum(torch.stack([loss, engine.grad_square_sum()]))
    norm = float(sums[1]) ** 0.5
    engine.update(step=step, lr=job.lr * min(1.0, step / WARMUP_STEPS), grad_scale=min(1.0, job.clip / norm))
    return float(sums[0]) / num_tokens, norm


def train(store: Store, rank: int, generation: int, job: Job) -> Trained:
    """Train a job from its first weights."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=60)
    engine = engine_for(job, mesh)
    return _finish(rank, job, mesh, engine, range(1, job.steps + 1))


def _finish(rank: int, job: Job, mesh: Mesh, engine: Engine, steps: range) -> Trained:
    rows = [step_once(job, mesh, engine, step) for step in steps]
    tokens, labels = share(job, mesh.layout, mesh.seat[1], *batch(job, 0))
    val = float(mesh.sum(engine.evaluate(tokens, labels))) / (job.samples * job.seq_len)
    pieces = {piece: t.cpu().numpy().copy() for piece, t in engine.state().items()}
    engine.close()
    mesh.close()
    return Trained([loss for loss, _ in rows], [norm for _, norm in rows], val, pieces)


def what_dtensor_holds(store: Store, rank: int, generation: int, jobs: list[Job]) -> list[str]:
    """Compare `atlas.held` with what is found in tensors of indices that DTensor and FSDP2 cut. Returns differences."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(jobs[0].layout), generation=generation, timeout_s=60)
    differences = []
    for job in jobs:
        engine = engine_for(job, mesh)
        differences += [f"{job.model}: {difference}" for difference in _differences(engine, mesh)]
        engine.close()
    mesh.close()
    return differences


def _differences(engine: FsdpEngine, mesh: Mesh) -> list[str]:
    said = {p.tensor: (p.box.start, p.box.shape) for p in engine.atlas.held(mesh.rank)}
    kept = {piece.tensor: tuple(tensor.shape) for piece, tensor in engine.state().items()}
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    cut = functools.cache(lambda shape, tp_dim: _cut_by_torch(shape, tp_dim, mesh))  # layers are alike
    for module in engine._stages.values():
        for name, parameter in module.named_parameters():
            spec = engine.atlas.by_name[f"param/{engine._aliases.get(name, name)}"]
            start, shape = cut(spec.shape, spec.tp_dim)
            assert _local_shape(parameter) == shape, f"{name}: {_local_shape(parameter)} {shape}"
            if 0 not in shape:
                found |= {f"{kind}/{spec.name.partition('/')[2]}": (start, shape) for kind in STATE_KINDS}
    return [
        *(f"{k}: {said.get(k)} {found.get(k)}" for k in said.keys() | found.keys() if said.get(k) != found.get(k)),
        *(f"state of {k}" for k in said.keys() | kept.keys() if k not in said or said[k][1] != kept.get(k)),
        *(
            f"{k}: not contiguous fp32"
            for k, t in engine.state().items()
            if not t.is_contiguous() or t.dtype != torch.float32
        ),
    ]


def _local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple((parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape)


def _cut_by_torch(shape: tuple[int, ...], tp_dim: int | None, mesh: Mesh) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(start, shape) of this rank's part, read off the values.

    Not from `compute_local_shape_and_global_offset`: where nothing divides it disagrees with what FSDP2 holds (2.13).
    """
    index = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    tensor: torch.Tensor = index
    if mesh.layout.tp > 1:
        placement = Replicate() if tp_dim is None else Shard(tp_dim)
        tensor = distribute_tensor(index, mesh.axis("tp"), [placement], src_data_rank=None)
    holder = nn.Module()
    holder.tensor = nn.Parameter(tensor)
    if mesh.layout.dp > 1:
        fully_shard(holder, mesh=mesh.axis("dp"))
    local = holder.tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    if not local.numel():
        return (0,) * len(shape), tuple(local.shape)
    start = tuple(int(i) for i in np.unravel_index(int(local.flatten()[0]), shape))
    inside = tuple(slice(a, a + n) for a, n in zip(start, local.shape, strict=True))
    assert torch.equal(index[inside], local), "what a rank holds is no box"
    return start, tuple(local.shape)


def train_from(store: Store, rank: int, generation: int, job: Job, step: int, whole: dict[str, np.ndarray]) -> Trained:
    """Load a logical state of `step` steps by boxes, and train on from there."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=60)
    engine = engine_for(job, mesh)
    state = engine.state()
    for piece, tensor in state.items():
        inside = piece.box.within(Box.whole(engine.atlas.by_name[piece.tensor].shape))
        tensor.copy_(torch.from_numpy(whole[piece.tensor][inside].copy()))
    engine.loaded(step)
    return _finish(rank, job, mesh, engine, range(step + 1, job.steps + 1))


def keeps_its_promises(store: Store, rank: int, generation: int, job: Job) -> list[str]:
    """Look for broken promises of `Engine`. Returns what was found."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=60)
    engine = engine_for(job, mesh)
    broken = []
    before = {name: tensor.data_ptr() for name, tensor in engine.state().items()}
    first = {name: tensor.clone() for name, tensor in engine.state().items()}
    tokens, labels = share(job, mesh.layout, mesh.seat[1], *batch(job, 1))
    losses = [float(mesh.sum(engine.forward_backward(tokens, labels, num_tokens=100))) for _ in range(2)]
    twice = float(mesh.sum(engine.grad_square_sum()))
    engine.discard()
    engine.forward_backward(tokens, labels, num_tokens=100)
    once = float(mesh.sum(engine.grad_square_sum()))
    if abs(twice / once - 4) > 1e-5:
        broken.append(f"gradients of two passes must add up, squared norms {once} and {twice}")
    engine.discard()
    if losses[0] != losses[1] or any(not torch.equal(first[name], t) for name, t in engine.state().items()):
        broken.append("what is discarded must leave no trace")
    if abs(float(mesh.sum(engine.evaluate(tokens, labels))) / losses[0] - 1) > 1e-6:
        broken.append("evaluate must give the loss of forward_backward")
    engine.forward_backward(tokens, labels, num_tokens=100)
    engine.update(step=1, lr=1e-3, grad_scale=1.0)
    if before != {name: tensor.data_ptr() for name, tensor in engine.state().items()}:
        broken.append("state must be live memory")
    if all(torch.equal(first[name], t) for name, t in engine.state().items()):
        broken.append("an update must change the state")
    try:
        engine.forward_backward(tokens[:1].repeat(3, 1), labels[:1].repeat(3, 1), num_tokens=1)
        broken.append("a batch that does not divide must be refused")
    except ValueError:
        pass
    engine.close()
    mesh.close()
    return broken
