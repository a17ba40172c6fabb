"""Devices: on what the ranks of a run compute, and why.

    a Ray cluster             Ray gives every worker a GPU of its machine and hides the others: a rank's is the first it sees
    emulated machines         are one machine, and share its GPUs: rank r computes on GPU r, whichever of them it sits on

All ranks of a run compute alike: on a GPU each, or else on processors.

Rule of this file: numbers in, a decision with its reason out. Who asks counts the GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from framework.config import Config


@dataclass(frozen=True, slots=True)
class Device:
    """What all ranks compute on: `cpu` or `cuda`."""

    kind: Literal["cpu", "cuda"]
    reason: str

    def __str__(self) -> str:
        return f"{'a GPU for each rank' if self.kind == 'cuda' else 'processors'}: {self.reason}"


def num_gpus() -> int:
    """The GPUs of this machine that this process may use. Touches none of them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def most_ranks(config: Config) -> int:
    """How many ranks a run may ever have at once."""
    degrees, cluster = config.layout.degrees, config.cluster
    return cluster.max_nodes * cluster.workers_per_node if degrees is None else degrees.world


def decide(config: Config, *, gpus_per_worker: float | None = None, count: Callable[[], int] = num_gpus) -> Device:
    """What a run computes on. `gpus_per_worker` is what the cluster of the run gives; None: nothing is known of it.

    Raises ValueError if `cluster.device=cuda` cannot be had.
    """
    wish = config.cluster.device
    if wish == "cpu":
        return Device("cpu", "cluster.device=cpu")
    if config.layout.engine == "deepspeed":
        return Device("cpu", "layout.engine=deepspeed computes there")
    return _emulated(config, count()) if config.cluster.address == "local" else _attached(config, gpus_per_worker)


def _emulated(config: Config, gpus: int) -> Device:
    """On one machine that emulates all."""
    wish, ranks = config.cluster.device, most_ranks(config)
    if 0 < ranks <= gpus:
        return Device("cuda", f"{ranks} of this machine's {gpus} GPUs" if gpus > 1 else "this machine's one GPU")
    fewer = "layout.pp=1 layout.dp=1 layout.tp=1" if gpus == 1 else f"a layout of at most {gpus} ranks"
    if wish == "cuda":
        advice = f"use {fewer}, or cluster.device=cpu" if gpus else "use cluster.device=cpu"
        raise ValueError(f"cluster.device: cuda needs a GPU of this machine for each of {ranks} ranks, got {gpus}; {advice}")
    if not gpus:
        return Device("cpu", "PyTorch sees no GPU here")
    return Device("cpu", f"{ranks} ranks may have to compute at once, and this machine has {gpus} GPU{'s' * (gpus > 1)}; {fewer} would use them")


def _attached(config: Config, gpus_per_worker: float | None) -> Device:
    """In a cluster whose machines are real."""
    if gpus_per_worker is None:
        return Device("cuda" if config.cluster.device == "cuda" else "cpu", "as far as is known before the cluster is joined")
    if gpus_per_worker:
        return Device("cuda", "every worker has one of its node")
    return Device("cpu", "no node has a GPU for each of its workers")


def device_of(kind: str, *, rank: int, emulated: bool) -> torch.device:
    """Where a rank computes."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", rank if emulated else 0)


def check_here(kind: str) -> None:
    """In a worker: raises ValueError if there is no GPU where there must be one."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "cluster.device: cuda must be had on every node, PyTorch sees no GPU on this one; install its build with CUDA there, "
            "or use cluster.device=cpu"
        )
