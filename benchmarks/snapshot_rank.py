"""One rank of `benchmarks/snapshot.py`: trains in blocks of steps, each block with another way of keeping the state.

    block = N steps; every k-th is followed by a save          gate: before the optimizer may write, as the way demands
            at the end of the block what is still under way is waited for, and that wait counts as part of the block

Rule of this file: a rank measures; what it means is said by the one who started it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from framework.model import Decoder
from framework.training.initial import InitialWeights
from parallel.assemble import meta
from parallel.checks import Wrapping
from parallel.engine import EngineOptions, FsdpEngine
from parallel.layout import Layout
from parallel.mesh import Mesh

Row = dict[str, Any]


class Way(Protocol):
    """How the state is kept. What `begin` and `gate` take is time in which training does not go on."""

    def ready(self) -> bool: ...

    def begin(self, step: int) -> None: ...

    def gate(self) -> None: ...

    def drain(self) -> None: ...


class Nothing:
    """No snapshots."""

    def ready(self) -> bool:
        """Always."""
        return True

    def begin(self, step: int) -> None:
        """Nothing."""

    gate = drain = lambda self: None


class Holdfast:
    """This project's, into the vaults of two nodes, with parity."""

    def __init__(self, engine: FsdpEngine, job: Row, rank: int) -> None:
        plan = SnapshotPlan.from_json(job["plan"])
        self._engine, self._last = engine, -1
        self._snapshotter = Snapshotter(plan, rank=rank, secret=bytes.fromhex(job["secret"]))

    def ready(self) -> bool:
        """Whether there is room. As in a run each rank says so in the step's report, and what finds none is left out."""
        return self._snapshotter.ready()

    def begin(self, step: int) -> None:
        """As a run does right after its update."""
        self._snapshotter.begin(step, {"step": step}, self._engine.state())
        self._last = step

    def gate(self) -> None:
        """Until the copy is done."""
        self._snapshotter.gate()

    def drain(self) -> None:
        """Until it is protected on all nodes."""
        while self._snapshotter.protected != self._last:
            assert not self._snapshotter.failure, self._snapshotter.failure
            time.sleep(0.001)


class TorchSave:
    """`torch.save` of each rank's shards."""

    def __init__(self, engine: FsdpEngine, folder: Path, rank: int) -> None:
        self._engine, self._file = engine, folder / f"torch-{rank}.pt"

    def ready(self) -> bool:
        """Nothing is under way."""
        return True

    def begin(self, step: int) -> None:
        """All of it is stall."""
        torch.save({piece.tensor: tensor for piece, tensor in self._engine.state().items()}, self._file)

    gate = drain = lambda self: None


class Dcp:
    """`dcp.save`, or `async_save` by a thread or a process, with a stager that is used again."""

    def __init__(self, engine: FsdpEngine, folder: Path, kind: str) -> None:
        self._engine, self._folder, self._kind = engine, folder / f"dcp-{kind}", kind
        self._mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._pending: Any = None

    def ready(self) -> bool:
        """A save that is not done yet is waited for."""
        return True

    def begin(self, step: int) -> None:
        """A save that is still under way is waited for: the stager's memory is its source."""
        self.drain()
        state = self._dtensors()
        if self._kind == "save":
            save(state, checkpoint_id=self._folder, process_group=self._group)
            return
        kind = AsyncCheckpointerType.THREAD if self._kind == "thread" else AsyncCheckpointerType.PROCESS
        self._pending = async_save(
            state, checkpoint_id=self._folder, async_checkpointer_type=kind, async_stager=self._stager, process_group=self._group
        )

    def gate(self) -> None:
        """Until the state is staged."""
        if isinstance(self._pending, AsyncSaveResponse):
            self._pending.staging_completion.result()

    def drain(self) -> None:
        """Until it is written."""
        pending, self._pending = self._pending, None
        if isinstance(pending, AsyncSaveResponse):
            pending.upload_completion.result()
        elif pending is not None:
            pending.result()

    def _dtensors(self) -> dict[str, DTensor]:
        found = {}
        for piece, tensor in self._engine.state().items():
            shape = torch.Size(self._engine.atlas.by_name[piece.tensor].shape)
            stride = torch.empty(shape, device="meta").stride()
            found[piece.tensor] = DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return found


class Bench:
    """An engine on two data-parallel ranks, and every way to keep its state."""

    def __init__(self, job: Row, rank: int, mesh: Mesh) -> None:
        self._mesh, self._job, self.rank = mesh, job, rank
        build = lambda: Decoder(**job["model"])  # noqa: E731
        wrapping = Wrapping(
            precision="fp32", sequence_parallel=False, reshard_after_forward=False, activation_checkpointing=False, compile=False
        )
        options = EngineOptions(
            schedule="1f1b", num_microbatches=1, wrapping=wrapping, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )
        self.engine = FsdpEngine(build, mesh=mesh, options=options)
        self.engine.initialise(InitialWeights(meta(build), seed=0))
        folder = Path(job["folder"])
        self.ways: dict[str, Way] = {
            "none": Nothing(),
            "holdfast": Holdfast(self.engine, job, rank),
            "torch.save": TorchSave(self.engine, folder, rank),
            "dcp.save": Dcp(self.engine, folder, "save"),
            "async_save thread": Dcp(self.engine, folder, "thread"),
            "async_save process": Dcp(self.engine, folder, "process"),
        }
        self.step = 0
        self._ready = True
        self._vault = psutil.Process(job["vaults"][rank])

    def block(self, name: str, *, every: int, steps: int) -> Row:
        """Train `steps` steps and keep the state after every `every`-th, the first included."""
        way, stalls, times, number = self.ways[name], list[float](), list[float](), 0
        self._ready = True
        dist.barrier()
        began, cpu = time.perf_counter(), self._processor_s()
        for index in range(steps):
            at = time.perf_counter()
            take = index % every == 0 and self._ready
            stalls.append(self._one(way, take=take))
            number += take and name != "none"
            times.append(time.perf_counter() - at)
        at = time.perf_counter()
        way.drain()
        dist.barrier()
        ended = time.perf_counter()
        worst = torch.tensor(stalls, dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        used = torch.tensor([self._processor_s() - cpu], dtype=torch.float64)
        dist.all_reduce(used)
        return {
            "way": name, "every": every, "steps": steps, "number": number, "seconds": ended - began, "drain": ended - at,
            "cpu": used.item(),
            "times": times, "stall": worst.sum().item() / max(1, number),
        }  # fmt: skip

    def _one(self, way: Way, *, take: bool) -> float:
        """Save, forward and backward, gate, update. Returns the seconds in which the way held the step up."""
        tokens = torch.randint(0, 256, (self._job["batch"], self._job["seq_len"] + 1))
        began = time.perf_counter()
        if take:
            way.begin(self.step)
        stall = time.perf_counter() - began
        self.engine.forward_backward(tokens[:, :-1], tokens[:, 1:], num_tokens=tokens.shape[0] * 2 * self._job["seq_len"])
        report = torch.stack([self.engine.grad_square_sum().double(), torch.tensor(float(not way.ready()), dtype=torch.float64)])
        self._ready = self._mesh.sum(report)[1].item() == 0
        began = time.perf_counter()
        way.gate()
        stall += time.perf_counter() - began
        self.step += 1
        self.engine.update(step=self.step, lr=1e-4, grad_scale=1.0)
        return stall


    def _processor_s(self) -> float:
        """Processor seconds of this rank, what it has started, and its node's vault."""
        mine = psutil.Process()
        times = [process.cpu_times() for process in (mine, *mine.children(recursive=True), self._vault)]
        return sum(t.user + t.system for t in times)


def _everywhere(here: bool) -> bool:
    flag = torch.tensor([float(here)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def main() -> None:
    """`snapshot_rank.py RANK JOB`, JOB a file of JSON; rank 0 writes its rows to the job's `out`."""
    rank, job = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    warnings.filterwarnings("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"] + 1)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = TCPStore("127.0.0.1", job["port"], None, rank == 0)
    mesh = Mesh.connect(store, rank=rank, layout=Layout(dp=2), generation=1, device="cpu")
    bench = Bench(job, rank, mesh)
    rows = []
    for name in bench.ways:  # each way's first time makes memory, threads and processes: not measured
        if name in job["ways"]:
            bench.block(name, every=1, steps=2)
    began = time.perf_counter()
    for number in range(job["rounds"]):
        if number and not _everywhere(time.perf_counter() - began < job["seconds"]):
            break  # on a slow machine: fewer rounds rather than none
        turn = [(way, every, steps) for every, steps in job["blocks"] for way in job["ways"] if way != "none"]
        rows.append(bench.block("none", every=1, steps=job["blocks"][0][1]) | {"round": number})
        for way, every, steps in turn[number % len(turn) :] + turn[: number % len(turn)]:
            for name in (way, "none"):  # what is compared lies side by side: the machine's mood changes within a round
                rows.append(bench.block(name, every=every, steps=steps) | {"round": number})
                if rank == 0:
                    print(json.dumps({k: v for k, v in rows[-1].items() if k != "times"}), flush=True)
    if rank == 0:
        Path(job["out"]).write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # the daemons of async_save would hold the process


if __name__ == "__main__":
    main()
