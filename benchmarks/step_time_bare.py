"""The other side of `step_time.py`: the same training as an expert writes it by hand, without holdfast's loop.

    torchrun --nproc-per-node 4 benchmarks/step_time_bare.py --pp 2 --dp 2 --tp 1 ... --out FILE

FSDP2, DTensor with sequence and loss parallelism, `torch.distributed.pipelining` with 1F1B, fused AdamW, clipping by
the global norm over all axes, cosine schedule; the loss is gathered and written down every `--log-every` steps. Only the
module (`framework.model.Decoder`) and the table of tensor-parallel styles are holdfast's, so that both train the same.
Rank 0 writes a JSON line: seconds of every step, and processor seconds of its process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

from framework.model import Decoder

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # it warns on every step


def build(options: argparse.Namespace, mesh: dist.device_mesh.DeviceMesh) -> tuple[torch.nn.Module, int]:
    """This rank's stage, cut and wrapped, and the number of stages."""
    torch.manual_seed(0)
    model = Decoder(**json.loads(options.model))
    pp, stage = options.pp, mesh["pp"].get_local_rank()
    names = list(model.layers)
    per = math.ceil(len(names) / pp)
    for name in names:
        if not stage * per <= int(name) < (stage + 1) * per:
            del model.layers[name]
    if stage > 0:
        model.embed = None
    if stage < pp - 1:
        model.norm = model.head = None
    if options.tp > 1:
        cut(model, mesh["tp"])
    if options.dp > 1:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
    return model, stage


def cut(model: Decoder, tp: dist.device_mesh.DeviceMesh) -> None:
    """Megatron's cut with sequence parallelism, as in PyTorch's own tutorial."""
    outer = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, tp, {name: style for name, style in outer.items() if getattr(model, name) is not None})
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    inner = {
        "attention_norm": SequenceParallel(use_local_output=True),
        "ffn_norm": SequenceParallel(use_local_output=True),
        "attention": gather,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn": gather,
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers.values():
        parallelize_module(layer, tp, inner)


def clip(parameters: list[torch.nn.Parameter], limit: float, pp: dist.ProcessGroup | None) -> float:
    """Clip by the global norm; the squares of each mesh's share are added over the pipeline, as torchtitan does."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if pp is not None:
        square = norm.square()
        dist.all_reduce(square, group=pp)
        norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return float(norm)


def main() -> None:
    """Train and write the times down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pp", "dp", "tp", "microbatches", "steps", "global-batch", "seq-len"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (options.pp, options.dp, options.tp), mesh_dim_names=("pp", "dp", "tp"))
    model, stage = build(options, mesh)
    last = stage == options.pp - 1
    batch, vocab = options.global_batch // options.dp, json.loads(options.model)["vocab_size"]
    num_tokens = batch * options.seq_len  # FSDP averages over replicas
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_tokens

    step_of_pipeline = None
    if options.pp > 1:
        step_of_pipeline = Schedule1F1B(
            PipelineStage(model, stage, options.pp, torch.device("cpu"), group=mesh.get_group("pp")),
            options.microbatches,
            loss_fn=loss_fn,
            scale_grads=False,
        )
    dice = torch.Generator().manual_seed(mesh["dp"].get_local_rank())
    times: list[float] = []
    cpu = 0.0
    for step in range(options.steps):
        if step == options.steps // 4:
            cpu = time.process_time()
        began = time.perf_counter()
        window = torch.randint(vocab, (batch, options.seq_len + 1), generator=dice)
        tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        with loss_parallel() if options.tp > 1 else contextlib.nullcontext():
            if step_of_pipeline is not None:
                losses: list[torch.Tensor] = []
                step_of_pipeline.step(*((tokens,) if stage == 0 else ()), target=labels if last else None, losses=losses)
                loss = torch.stack(losses).sum() if last else torch.zeros(())
            else:
                loss = loss_fn(model(tokens), labels)
                loss.backward()
        clip(parameters, 1.0, mesh.get_group("pp") if options.pp > 1 else None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % options.log_every == 0:
            shown = loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach().clone()
            dist.all_reduce(shown)
        times.append(time.perf_counter() - began)
    spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
    dist.all_reduce(spent)
    if dist.get_rank() == 0:
        Path(options.out).write_text(json.dumps({"times": times, "cpu_s": spent.item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
