"""Real ranks for tests of the record: processes from a fork server, gloo, one ring each that the test reads from outside."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from parallel.record import Ring, decode
from parallel.ring import RingReader, create

PRELOAD = ["torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.pipelining", "parallel.recorder"]


@dataclass
class Ranks:
    """Started ranks: their processes, results and rings."""

    processes: list[Any]
    results: list[Connection]
    rings: list[RingReader]

    def ring(self, rank: int) -> Ring:
        return decode(wait_for(lambda: self.rings[rank].read(whole=True)))

    def observed(self) -> dict[int, bytes]:
        return {rank: ring.read() for rank, ring in enumerate(self.rings)}

    def result(self, rank: int, timeout_s: float = 60) -> Any:
        if not self.results[rank].poll(timeout_s):
            raise TimeoutError(f"rank {rank} gave no result within {timeout_s} s")
        value = self.results[rank].recv()
        if isinstance(value, BaseException):
            raise value
        return value

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)


@contextlib.contextmanager
def ranks(
    world: int, work: Callable[..., Any], *args: Any, timeout_s: float = 30, record: bool = True
) -> Iterator[Ranks]:
    """`work(rank, recorder, *args)` in `world` processes, connected by a default gloo group; killed at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        for rank in range(world):
            os.close(create(f"ring{rank}", directory=home))
        processes, results = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world, home, timeout_s, record, theirs, work, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            results.append(mine)
        rings = [RingReader(f"{home}/ring{rank}") for rank in range(world)]
        try:
            yield Ranks(processes, results, rings)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            for process in processes:
                process.join()
            for ring in rings:
                ring.close()


def run(world: int, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """The results of all ranks."""
    with ranks(world, work, *args, **options) as started:
        return [started.result(rank) for rank in range(world)]


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"nothing came within {timeout_s} s")


def _rank(
    rank: int,
    world: int,
    home: str,
    timeout_s: float,
    record: bool,
    out: Connection,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from parallel.recorder import install

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        recorder = install(Path(home) / f"ring{rank}") if record else None
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{home}/store", world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        out.send(work(rank, recorder, *args))
    except BaseException as error:
        out.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
    time.sleep(3600)  # the test reads the ring of a living process, then kills it
