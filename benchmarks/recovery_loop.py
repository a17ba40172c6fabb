"""The training loop of the peers in `benchmarks/recovery.py`: FSDP2, and a DCP checkpoint every N steps, read at the start.

    torchrun ... recovery_loop.py JOB                under torchrun, which starts it anew when a rank is lost
    python recovery_loop.py ADDRESS JOB              under Ray Train, with elastic workers, on the cluster at ADDRESS

Model, batch, samples and optimizer are those of the run of Holdfast. Rank 0 writes a line for every step; every rank leaves
its pid under the name of its node, so that the right one can be killed.

Rule of this file: what an engineer writes who knows these tools; `recovery.py` starts it, hurts it and keeps the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from framework.data.sources import SyntheticSource
from framework.data.synthetic import SyntheticData
from framework.model import Decoder


def train(job: dict[str, Any], node: str) -> None:
    """Train until somebody ends it. The process group is there already."""
    torch.set_num_threads(1)
    rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(job["folder"])
    (folder / "pids" / node).write_text(str(os.getpid()))
    torch.manual_seed(0)
    model = Decoder(**job["model"])
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95), fused=True)
    data = SyntheticData.of(SyntheticSource(**job["data"]), seed=0)
    start = _load(model, optimizer, folder)
    life = f"{time.time():.3f}"
    share = job["batch"] // world
    with (folder / "steps").open("a", buffering=1) as steps:
        for step in range(start + 1, job["steps"] + 1):
            first = (step - 1) * job["batch"] + rank * share
            tokens = torch.stack([torch.as_tensor(data.train(i)) for i in range(first, first + share)]).long()
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss.detach(), dist.ReduceOp.AVG)
            if rank == 0:
                steps.write(json.dumps({"step": step, "life": life, "loss": loss.item()}) + "\n")
            if step % job["every"] == 0:
                _save(model, optimizer, folder, step)


def _save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    began = time.perf_counter()
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder / f"step_{step}", no_dist=False)
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(f"step_{step}")
        (folder / "latest.new").rename(folder / "latest")
        with (folder / "saves").open("a") as saves:
            saves.write(f"{time.perf_counter() - began}\n")


def _load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    if not (folder / "latest").exists():
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    load(state, checkpoint_id=folder / (folder / "latest").read_text())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def _torchrun(job: dict[str, Any]) -> None:
    # Agents count restarts each for itself, and ranks look for each other under that number: after a failure on one node they
    # would wait for ever. Every rendezvous has a store of its own here (TORCH_DISABLE_SHARE_RDZV_TCP_STORE), so any will do.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    dist.init_process_group("gloo")
    train(job, os.environ["BENCH_NODE"])


def _ray_train(address: str, job: dict[str, Any]) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    here = str(Path(__file__).resolve().parents[1])
    environment = {"PYTHONPATH": here, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ray.init(address, runtime_env={"env_vars": environment}, logging_level="ERROR")
    TorchTrainer(
        _ray_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=(2, job["nodes"]), resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=job["folder"], name="ray", failure_config=FailureConfig(max_failures=-1)),
    ).fit()


def _ray_worker(job: dict[str, Any]) -> None:
    import ray

    train(job, str(ray.util.get_node_ip_address()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if len(sys.argv) == 2:
            _torchrun(json.loads(sys.argv[1]))
        elif len(sys.argv) == 3:
            from benchmarks import recovery_loop  # so that Ray finds its functions by their module

            recovery_loop._ray_train(sys.argv[1], json.loads(sys.argv[2]))
        else:
            print("started by benchmarks/recovery.py")
