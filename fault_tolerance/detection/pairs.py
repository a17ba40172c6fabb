"""Pairs: runs a pair test over a process group, every rank of it calling together.

    round:  a asks b ("go", 1 byte), b answers with the payload, a notes the time: the way b -> a
            then the other way round; then a barrier and the next round

Rule of this file: it measures and shares the numbers; `pairtest.py` planned them and judges them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from fault_tolerance.detection.pairtest import Pair


def measure_ways(
    group: dist.ProcessGroup,
    rounds: Sequence[Sequence[Pair]],
    *,
    device: torch.device | str = "cpu",
    num_bytes: int = 1 << 20,
    repeats: int = 3,
) -> dict[Pair, float]:
    """Seconds of a message on each way (from, to) in these rounds, the best of `repeats`; the same on all ranks.

    Pairs are ranks in the group. Every rank of the group must call it with the same arguments. Raises what gloo raises
    when a rank fails meanwhile.
    """
    me, mine = dist.get_rank(group), {}
    payload = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    go = torch.zeros(1, dtype=torch.uint8, device=device)
    for pairs in rounds:
        dist.barrier(group)
        for a, b in pairs:
            for source, target in ((a, b), (b, a)):
                if me == target:
                    mine[source, target] = _receive(group, source, payload, go, repeats)
                elif me == source:
                    _answer(group, target, payload, go, repeats)
    shared: list[dict[Pair, float] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shared, mine, group)
    return {pair: seconds for part in shared if part for pair, seconds in part.items()}


def measure_compute(
    group: dist.ProcessGroup, *, device: torch.device | str = "cpu", size: int = 384, blocks: int = 9
) -> dict[int, float]:
    """Seconds of the same small computation on each rank of the group, the median of `blocks`; the same on all ranks.

    Time in which a rank was ready and its machine had no processor for it is taken off: that is the machine's load, and
    several ranks of one machine compute at once here.
    """
    x = torch.ones(size, size, device=device)
    _block(x)
    took = statistics.median(_block(x) for _ in range(blocks))
    shared: list[float | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shared, took, group)
    return {rank: seconds for rank, seconds in enumerate(shared) if seconds is not None}


def _block(x: torch.Tensor) -> float:
    """Long against the time slices of whatever stops and continues a process."""
    starved, start = _starved_s(), time.perf_counter()
    for _ in range(8):
        x @ x
    if x.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    return max(took - (_starved_s() - starved), 1e-6)


def _starved_s() -> float:
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _receive(group: dist.ProcessGroup, source: int, payload: torch.Tensor, go: torch.Tensor, repeats: int) -> float:
    peer, best = dist.get_global_rank(group, source), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        dist.send(go, peer, group)
        dist.recv(payload, peer, group)
        best = min(best, time.perf_counter() - start)
    return best


def _answer(group: dist.ProcessGroup, target: int, payload: torch.Tensor, go: torch.Tensor, repeats: int) -> None:
    peer = dist.get_global_rank(group, target)
    for _ in range(repeats):
        dist.recv(go, peer, group)
        dist.send(payload, peer, group)
