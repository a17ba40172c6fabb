"""One rank of `benchmarks/checkpoint.py`: saves and loads a state in every way, each timed from barrier to barrier.

Rule of this file: a rank measures; what it means is said by the one who started it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.vault_rank import Restore, Stage
from fault_tolerance.checkpoints.checkpoint import Checkpoint, commit
from fault_tolerance.checkpoints.shard import write_shard
from framework.model import Decoder
from parallel.atlas import Atlas, Piece
from parallel.boxes import Box
from parallel.layout import Layout
from parallel.specs import state_specs

Row = dict[str, Any]
PLACES = {"holdfast": "holdfast", "torch.save": "torch", "dcp.save": "dcp", "dcp.async_save": "dcp_async", "deepspeed": "deepspeed"}


class Bench:
    """This rank's share of the state under a layout, and the ways to save and load it."""

    def __init__(self, model: dict[str, Any], layout: str, folder: Path) -> None:
        self.rank, self.world, self.folder = dist.get_rank(), dist.get_world_size(), folder
        with torch.device("meta"):
            whole = Decoder(**model)
        self.model = model
        self.atlas = Atlas(state_specs(whole), Layout.parse(layout), "1f1b", model["num_layers"])
        self.held = {piece: torch.randn(piece.box.shape) for piece in self.atlas.held(self.rank)}
        self.owned = self.atlas.owned(self.rank)
        self.arena = {piece: torch.zeros_like(tensor) for piece, tensor in self.held.items()}
        self.mesh: DeviceMesh = init_device_mesh("cpu", (self.world,))
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.background = dist.new_group(backend="gloo")

    def cleared(self, place: str) -> None:
        """A save begins in an empty place, as a new step does, and with a disk that owes nothing to the one before it."""
        if self.rank == 0:
            shutil.rmtree(self.folder / place, ignore_errors=True)
            os.sync()

    def timed(self, name: str, call: Callable[[], Any]) -> Row:
        """Run on all ranks at once; seconds of the slowest, and the bytes that all of them read."""
        dist.barrier()
        before, start = _bytes_read(), time.perf_counter()
        stall = call()
        took = time.perf_counter() - start
        read = _bytes_read() - before
        slowest = torch.tensor([took, stall if isinstance(stall, float) else took], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        total = torch.tensor(read, dtype=torch.float64)
        dist.all_reduce(total)
        return {"way": name, "seconds": slowest[0].item(), "stall": slowest[1].item(), "read": total.item()}

    def save_holdfast(self) -> float:
        """The stall is the copy into memory that a snapshot takes too; the rest runs beside the next steps."""
        start = time.perf_counter()
        for piece, tensor in self.held.items():
            self.arena[piece].copy_(tensor)
        stall = time.perf_counter() - start
        directory = str(self.folder / "holdfast" / "step_000001")
        pairs = [(piece, self._part(piece)) for piece in self.owned]
        entry = write_shard(directory, f"rank{self.rank}", pairs, specs=self.atlas.specs)
        entries: list[Any] = [None] * self.world
        dist.gather_object(entry, entries if self.rank == 0 else None)
        if self.rank == 0:
            commit(directory, entries, specs=self.atlas.specs, extra={"step": 1})
        dist.barrier()
        return stall

    def load_holdfast(self) -> None:
        """Into the memory that training uses, every byte verified."""
        Checkpoint.open(str(self.folder / "holdfast" / "step_000001")).read_into(self.held)

    def save_torch(self) -> None:
        """Each rank its own shards, without dedup or index; durable like the others."""
        file = self.folder / "torch" / f"{self.rank}.pt"
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as out:
            torch.save({piece.tensor: tensor for piece, tensor in self.held.items()}, out)
            out.flush()
            os.fsync(out.fileno())

    def load_torch(self) -> None:
        """Only the same layout."""
        for name, tensor in torch.load(self.folder / "torch" / f"{self.rank}.pt", weights_only=True).items():
            self.held[Piece(name, self._box(name))].copy_(tensor)

    def save_dcp(self) -> None:
        """`dcp.save`: all of it is stall."""
        save(self._dtensors(), checkpoint_id=self.folder / "dcp")

    def save_dcp_async(self) -> float:
        """`dcp.async_save` with a reused stager, as cheap as it goes on a CPU; durable when its future is done."""
        start = time.perf_counter()
        place = self.folder / "dcp_async"
        future = async_save(
            self._dtensors(), checkpoint_id=place, async_stager=self.stager, process_group=self.background
        )
        if isinstance(future, AsyncSaveResponse):
            future.staging_completion.result()
            stall = time.perf_counter() - start
            future.upload_completion.result()
        else:
            stall = time.perf_counter() - start
            future.result()
        return stall

    def load_dcp(self) -> None:
        """`dcp.load` into the same tensors."""
        load(self._dtensors(), checkpoint_id=self.folder / "dcp")

    def needed(self) -> int:
        """Bytes of this rank's pieces."""
        return sum(tensor.nbytes for tensor in self.held.values())

    def _part(self, piece: Piece) -> Tensor:
        """A piece of what was staged: the arena holds the boxes that contain it."""
        box = self._box(piece.tensor)
        return self.arena[Piece(piece.tensor, box)][piece.box.within(box)].contiguous()

    def _box(self, name: str) -> Box:
        return next(piece.box for piece in self.held if piece.tensor == name)

    def _dtensors(self) -> dict[str, DTensor]:
        """The same state as FSDP's ranks hold it: sharded along dim 0."""
        found = {}
        for piece, tensor in self.held.items():
            shape = torch.Size(self.atlas.by_name[piece.tensor].shape)
            found[piece.tensor] = DTensor.from_local(
                tensor,
                self.mesh,
                [Shard(0)],
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
        return found


class DeepSpeedBench:
    """A ZeRO-2 engine of the same model, with one step taken so that it has moments."""

    def __init__(self, model: dict[str, Any], folder: Path, *, universal: bool) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.folder = folder
        module = Decoder(**model)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
            "checkpoint": {"load_universal": universal},
            "zero_allow_untested_optimizer": True,
        }
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        loss = self.engine(torch.zeros(1, 8, dtype=torch.long)).float().square().mean()
        self.engine.backward(loss)
        self.engine.step()

    def save(self) -> None:
        """All of it is stall."""
        self.engine.save_checkpoint(str(self.folder / "deepspeed"), tag="step")

    def load(self) -> None:
        """The universal checkpoint that the converter made in between."""
        self.engine.load_checkpoint(str(self.folder / "universal"), tag="step_universal")


def main() -> None:
    """`checkpoint_rank.py RANK WORLD PORT JOB`, JOB a JSON file; rank 0 writes its rows to the job's `out`."""
    rank, world, port = map(int, sys.argv[1:4])
    job = json.loads(Path(sys.argv[4]).read_text())
    warnings.filterwarnings("ignore")
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_SIZE": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    folder = Path(job["folder"])
    bench = Bench(job["model"], job["layout"], folder)
    stage = Stage(job["vaults"], rank, bench.held) if job["phase"] == "same" else None
    restore = Restore(job["vaults"], rank, bench.atlas, bench.held) if job["phase"] == "other" else None
    rows = [
        row | {"what": what, "round": number}
        for number in range(job["rounds"])
        for what, name, call in _turn(bench, _engine(job, folder), stage or restore, number)
        for row in [_measured(bench, what, name, call)]
    ]
    if stage is not None:
        stage.close()
    needed = torch.tensor(bench.needed(), dtype=torch.float64)
    dist.all_reduce(needed)
    if rank == 0:
        Path(job["out"]).write_text(json.dumps({"rows": rows, "needed": needed.item()}))
    dist.barrier()
    dist.destroy_process_group()


def _measured(bench: Bench, what: str, name: str, call: Callable[[], Any]) -> Row:
    if what == "save" and name in PLACES:
        bench.cleared(PLACES[name])
    return bench.timed(name, call)


_ENGINE: list[DeepSpeedBench] = []


def _engine(job: dict[str, Any], folder: Path) -> DeepSpeedBench | None:
    """The engine, made once, or None where it is left out."""
    if job["deepspeed"] and not _ENGINE:
        with io.StringIO() as _:
            _ENGINE.append(DeepSpeedBench(job["model"], folder, universal=job["phase"] == "other"))
    return _ENGINE[0] if _ENGINE else None


def _turn(
    bench: Bench, engine: DeepSpeedBench | None, vaults: Stage | Restore | None, number: int
) -> list[tuple[str, str, Callable[[], Any]]]:
    """One round: every way once, starting with another one each time."""
    if isinstance(vaults, Stage):
        saves = [
            ("save", "vaults", vaults.save),
            ("save", "holdfast", bench.save_holdfast),
            ("save", "torch.save", bench.save_torch),
            ("save", "dcp.save", bench.save_dcp),
            ("save", "dcp.async_save", bench.save_dcp_async),
        ]
        saves += [("save", "deepspeed", engine.save)] if engine is not None else []
        loads = [
            ("load same", "holdfast", bench.load_holdfast),
            ("load same", "torch.save", bench.load_torch),
            ("load same", "dcp.save", bench.load_dcp),
        ]
        return _rotated(saves, number) + _rotated(loads, number)
    assert vaults is not None
    loads = [("load other", "holdfast", bench.load_holdfast), ("load other", "dcp.save", bench.load_dcp)]
    loads += [("load other", "vaults", vaults.load), ("load other", "vaults, a node lost", vaults.load_lost)]
    loads += [("load other", "deepspeed", engine.load)] if engine is not None else []
    return _rotated(loads, number)


def _rotated(ways: list[Any], by: int) -> list[Any]:
    by %= len(ways)
    return ways[by:] + ways[:by]


def _bytes_read() -> int:
    """Bytes that this process has got from read calls so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    main()
