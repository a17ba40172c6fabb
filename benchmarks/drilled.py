"""Drilled: a crew of real ranks that do what training does on the wire, and one of whom is told to misbehave.

Groups are those of `parallel.mesh`; a step is 1F1B over pp with messages, all-reduces over tp in every microbatch, a
reduce-scatter and an all-gather over dp, and the reduction of a norm over all. Computation is a sleep, so that many ranks
fit on few cores, with noise of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts
from parallel.layout import Layout
from parallel.ring import RingReader, create

PRELOAD = ["torch", "torch.distributed", "parallel.mesh", "parallel.recorder", "fault_tolerance.detection.pairs"]
FLAG_GO_ON, FLAG_PAIR_TEST, FLAG_END = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Injection:
    """What goes wrong: `kind` in straggler, sigstop, gil, skipped, killed, slow_link, none; on `rank` from `step` on."""

    kind: str
    rank: int = -1
    step: int = -1
    severity: float = 1.0
    to: int = -1  # the other end of a slow link


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds of a forward of one microbatch, bytes of what goes over each axis, how noisy."""

    forward_s: float = 0.010
    message_bytes: int = 64 << 10
    gradient_bytes: int = 256 << 10
    activation_bytes: int = 16 << 10
    num_microbatches: int = 3
    noise: float = 0.05


@dataclass
class Crew:
    """The processes of one run and the way to read them."""

    processes: list[Any]
    results: list[Connection]
    orders: Connection
    rings: list[RingReader]
    said: dict[str, Any] = field(default_factory=dict)

    def observed(self) -> dict[int, bytes]:
        return {rank: ring.read() for rank, ring in enumerate(self.rings)}

    def listen(self) -> dict[str, Any]:
        """What ranks said so far: `onset` (when the injection acted), `ways` (a pair test), `ended` (how many)."""
        for pipe in self.results:
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll():
                    what, value = pipe.recv()
                    self.said[what] = self.said.get("ended", 0) + 1 if what == "ended" else value
        return self.said


@contextlib.contextmanager
def crew(
    layout: Layout, injection: Injection, *, steps: int, seed: int, hosts: Hosts | None = None, load: Load | None = None
) -> Iterator[Crew]:
    """Start the ranks; kill what is left at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="holdfast-drill-") as home:
        orders, orders_end = context.Pipe()
        processes, results = [], []
        for rank in range(layout.world):
            os.close(create(f"ring{rank}", directory=home))
            mine, theirs = context.Pipe(duplex=False)
            listens = orders_end if rank == 0 else None
            args = (rank, layout, home, injection, steps, seed, hosts, load or Load(), theirs, listens)
            process = context.Process(target=_rank, args=args, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            results.append(mine)
        rings = [RingReader(f"{home}/ring{rank}") for rank in range(layout.world)]
        try:
            yield Crew(processes, results, orders, rings)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for ring in rings:
                ring.close()


def _rank(
    rank: int,
    layout: Layout,
    home: str,
    injection: Injection,
    steps: int,
    seed: int,
    hosts: Hosts | None,
    load: Load,
    out: Connection,
    orders: Connection | None,
) -> None:
    if hosts is not None:
        hosts.enter(rank)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    from parallel.mesh import Mesh
    from parallel.record import Phase
    from parallel.recorder import install

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # names of collectives that torch renames
    recorder = install(Path(home) / f"ring{rank}", rank=rank)
    mesh = Mesh.connect(dist.FileStore(f"{home}/store", layout.world), rank=rank, layout=layout, generation=0)
    trainer = _Trainer(rank, layout, mesh, injection, load, random.Random(seed * 100 + rank), out)
    try:
        for step in range(steps):
            recorder.mark(step, Phase.TRAIN)
            flag = trainer.step(step, orders)
            if flag == FLAG_END:
                break
            if flag == FLAG_PAIR_TEST:
                recorder.mark(step, Phase.EVALUATE)
                trainer.pair_test()
        recorder.mark(steps, Phase.IDLE)
        out.send(("ended", 1))
    except RuntimeError as error:
        out.send(("failed", f"rank {rank}: {error}"))
    time.sleep(3600)


class _Trainer:
    """One rank's steps."""

    def __init__(
        self,
        rank: int,
        layout: Layout,
        mesh: Any,
        injection: Injection,
        load: Load,
        dice: random.Random,
        out: Connection,
    ) -> None:
        import torch

        self.rank, self.layout, self.mesh, self.injection, self.load = rank, layout, mesh, injection, load
        self.dice, self.out = dice, out
        self.pp, self.dp, self.tp = layout.seat(rank)
        self.message = torch.zeros(load.message_bytes // 4)
        self.activation = torch.zeros(load.activation_bytes // 4)
        self.gradient = torch.zeros(load.gradient_bytes // 4 // layout.dp * layout.dp)
        self.norm = torch.zeros(2)
        self.slow = 1.0

    def step(self, step: int, orders: Connection | None) -> int:
        import torch.distributed as dist

        self._inject(step)
        warm = min(self.layout.pp - self.pp - 1, self.load.num_microbatches)
        order = ["F"] * warm + ["F", "B"] * (self.load.num_microbatches - warm) + ["B"] * warm
        sends = [send for kind in order if (send := self._pass(kind))]
        for send in sends:
            send.wait()
        skipping = self.injection.kind == "skipped" and (self.rank, step) == (self.injection.rank, self.injection.step)
        if skipping:
            self._say_onset()
        if self.layout.dp > 1 and not skipping:
            shard = self.gradient.view(self.layout.dp, -1)[0].clone()
            dist.reduce_scatter_tensor(shard, self.gradient, group=self.mesh.group("dp"))
            dist.all_gather_into_tensor(self.gradient, shard, group=self.mesh.group("dp"))
        self.norm[:] = 0
        if orders is not None and orders.poll():
            self.norm[1] = orders.recv()
        if not (skipping and self.layout.dp == 1):
            dist.all_reduce(self.norm)
        self._compute(0.3 * self.load.forward_s)
        return int(self.norm[1])

    def pair_test(self) -> None:
        import torch.distributed as dist

        from fault_tolerance.detection.pairs import measure_ways
        from fault_tolerance.detection.pairtest import all_rounds

        everybody = dist.group.WORLD
        assert everybody is not None
        ways = measure_ways(everybody, all_rounds(range(self.layout.world)), num_bytes=1 << 20)
        if self.rank == 0:
            self.out.send(("ways", ways))

    def _pass(self, kind: str) -> Any:
        import torch
        import torch.distributed as dist

        before, after = (self.pp - 1, self.pp + 1) if kind == "F" else (self.pp + 1, self.pp - 1)
        if 0 <= before < self.layout.pp:
            dist.recv(self.message, self.layout.rank(before, self.dp, self.tp), group=self.mesh.group("pp"))
        seconds = self.load.forward_s * (1 if kind == "F" else 2)
        for _ in range(2):
            self._compute(seconds / 2)
            if self.layout.tp > 1:
                dist.all_reduce(self.activation, group=self.mesh.group("tp"))
        if not 0 <= after < self.layout.pp:
            return None
        return dist.isend(
            torch.clone(self.message), self.layout.rank(after, self.dp, self.tp), group=self.mesh.group("pp")
        )

    def _compute(self, seconds: float) -> None:
        time.sleep(seconds * self.slow * self.dice.lognormvariate(0, self.load.noise))

    def _inject(self, step: int) -> None:
        if self.rank != self.injection.rank or step != self.injection.step:
            return
        kind = self.injection.kind
        if kind in ("straggler", "sigstop", "gil", "killed"):
            self._say_onset()
        if kind == "straggler":
            self.slow = self.injection.severity
        elif kind == "sigstop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "gil":
            ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock

    def _say_onset(self) -> None:
        self.out.send(("onset", time.monotonic()))
