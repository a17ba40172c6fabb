"""One GPU: how fast models train on it, and what snapshots of them cost, coded over the vaults of four nodes.

    speed       tokens per second and model FLOPs utilisation, bf16, with and without `layout.compile`
    snapshots   steps without any; with ours, straight into memory that is pinned, and through buffers; with what torch's async_save does
                "stall" is what a step waits, "slowed" what the steps meanwhile take longer, until the snapshot is safe

One process trains, as a rank does; the vaults are processes of their own on the same machine. The others' way writes into a tmpfs.

    python -m benchmarks.gpu [--speed 100m 1b] [--snapshots 400m] [--compile] [--rounds 3] [--run DIRECTORY]

The incidents of a run that was killed on a GPU (`--run`) are told beside it. It writes `benchmarks/results/gpu.json` and `.md`; what is not measured keeps its last figures.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.vaults import vaults
from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.device_copy import DeviceCopy
from fault_tolerance.snapshots.snapshot import COPY_BYTES, Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault_client import VaultClient
from framework.model import Decoder, flops_per_token, num_params
from framework.training.initial import InitialWeights
from framework.training.peak import peak_flops
from parallel.assemble import meta
from parallel.checks import Wrapping
from parallel.engine import EngineOptions, FsdpEngine
from parallel.layout import Layout
from parallel.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NODES = ("n0", "n1", "n2", "n3")
VOCAB = 50304
PARTS = ("kind", "tier", "bytes_peer", "detect_s", "plan_s", "muster_s", "connect_s", "build_s", "restore_s", "first_step_s", "total_s")
THEIRS = "torch's stager and save in a thread"
WARM, STEPS, LEAST = 4, 15, 6
SHAPES = {"400m": {"num_layers": 24, "dim": 1024, "num_heads": 16, "num_kv_heads": 16, "ffn_dim": 2816}}
BATCHES = {"20m": (32, 512), "100m": (32, 1024), "125m": (32, 1024), "400m": (16, 1024), "tiny": (2, 64), "1b": (8, 1024)}


def main() -> None:
    """Measure and write."""
    options = _options()
    options.out.mkdir(exist_ok=True, parents=True)
    file = options.out / "gpu.json"
    report = json.loads(file.read_text()) if file.exists() else {"speed": {}, "snapshots": {}}
    if options.run is not None:
        report["incidents"] = json.loads((options.run / "summary.json").read_text())["incidents"]
    if options.speed or options.snapshots:
        _measure(report, options)
    (options.out / "gpu.md").write_text(_markdown(report))
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(_markdown(report), flush=True)
    os._exit(0)  # the threads of the other way would hold the process


def _measure(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Adds to the report."""
    report["machine"] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "cores": os.cpu_count()}
    store = dist.HashStore()
    mesh = Mesh.connect(store, rank=0, layout=Layout(), generation=1, device=options.device, timeout_s=60)
    for preset in options.speed:
        for compile in (False, True)[: 1 + options.compile]:
            report["speed"][f"{preset}{' compiled' if compile else ''}"] = found = _speed(preset, mesh, compile=compile)
            print(preset, found, flush=True)
    for preset in options.snapshots:
        report["snapshots"][preset] = _snapshots(preset, mesh, options, report["snapshots"].get(preset, {"rows": []}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", nargs="*", default=["100m", "400m", "1b"])
    parser.add_argument("--snapshots", nargs="*", default=["400m"])
    parser.add_argument("--ways", nargs="+", default=["ours", "theirs"], choices=["ours", "theirs"])
    parser.add_argument("--compile", action="store_true", help="speed with layout.compile, too")
    parser.add_argument("--run", type=Path, help="a run directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


class Bench:
    """An engine of one rank and its batches."""

    def __init__(self, preset: str, mesh: Mesh, *, compile: bool = False) -> None:
        file = ROOT / "configs" / "model" / f"{preset}.yaml"
        values = SHAPES[preset] if preset in SHAPES else yaml.safe_load(file.read_text())
        self.model = {key: value for key, value in values.items() if not key.startswith("_")} | {"vocab_size": VOCAB}
        self.batch, self.seq_len = BATCHES[preset]
        build = lambda: Decoder(**self.model)  # noqa: E731
        wrapping = Wrapping(precision="bf16", compile=compile)
        self.engine = FsdpEngine(build, mesh=mesh, options=EngineOptions(wrapping=wrapping))
        self.engine.initialise(InitialWeights(meta(build), seed=0))
        self.params, self.flops = num_params(meta(build)), flops_per_token(meta(build), seq_len=self.seq_len)
        self.mesh, self.step = mesh, 0

    def one(self, *, begin: Callable[[int], None] = lambda step: None, gate: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """A step as a trainer takes it: (its seconds, the seconds of it that it waited)."""
        began = time.perf_counter()
        begin(self.step)
        waited = time.perf_counter() - began
        tokens = torch.randint(0, VOCAB, (self.batch, self.seq_len + 1))
        loss = self.engine.forward_backward(tokens[:, :-1], tokens[:, 1:], num_tokens=self.batch * self.seq_len)
        self.mesh.sum(torch.stack([loss.double(), self.engine.grad_square_sum().double()])).tolist()
        at = time.perf_counter()
        gate()
        waited += time.perf_counter() - at
        self.step += 1
        self.engine.update(step=self.step, lr=1e-4, grad_scale=1.0)
        return time.perf_counter() - began, waited


def _speed(preset: str, mesh: Mesh, *, compile: bool) -> dict[str, Any]:
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench = Bench(preset, mesh, compile=compile)
    began = time.perf_counter()
    bench.one()
    first = time.perf_counter() - began
    for _ in range(WARM):
        bench.one()
    seconds = statistics.median(bench.one()[0] for _ in range(STEPS))
    tokens = bench.batch * bench.seq_len
    found = {
        "params": bench.params, "batch": bench.batch, "seq_len": bench.seq_len, "step_s": seconds, "tokens_per_s": tokens / seconds,
        "mfu": bench.flops * tokens / seconds / peak_flops(mesh.device.type, precision="bf16"), "first_step_s": first,
        "memory_bytes": torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else None,
    }  # fmt: skip
    bench.engine.close()
    return found


def _snapshots(preset: str, mesh: Mesh, options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Each way by itself: steps without any, then one with a snapshot, which is followed to its end, again and again."""
    bench = Bench(preset, mesh)
    found = {"params": bench.params, "state_bytes": sum(t.nbytes for t in bench.engine.state().values()), "tokens": bench.batch * bench.seq_len}
    ours, theirs = ([row for row in known["rows"] if (row["way"] == THEIRS) is other] for other in (False, True))
    if "ours" in options.ways:
        ours = _all_ours(bench, options.rounds)
    if "theirs" in options.ways:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-") as folder:
            theirs = _theirs(bench, folder, rounds=options.rounds)
    bench.engine.close()
    return {**found, "rows": ours + theirs}


def _all_ours(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Straight into the vault's memory, and through buffers."""
    run, secret = "bench" + secrets.token_hex(4), secrets.token_bytes(16)
    rows: list[dict[str, Any]] = []
    with vaults(NODES, run=run, secret=secret) as (addresses, _):
        clients = [VaultClient(address, run=run, secret=secret) for address in addresses.values()]
        for generation, pinned in ((1, True), (2, False)):
            plan = SnapshotPlan(
                run=run, generation=generation, atlas=bench.engine.atlas, seats=NODES[:1], addresses=addresses, chunk_bytes=4 << 20,
                groups=plan_groups(dict.fromkeys(NODES), tolerate=1, group_size=len(NODES)),
            )  # fmt: skip
            for client in clients:
                client.open(plan, timeout_s=120.0)
            name = "holdfast" if pinned else "holdfast, through buffers"
            rows += _ours(bench, plan, secret, name, pinned=pinned, rounds=rounds)
    return rows


def _ours(bench: Bench, plan: SnapshotPlan, secret: bytes, name: str, *, pinned: bool, rounds: int) -> list[dict[str, Any]]:
    snapshotter = Snapshotter(plan, rank=0, secret=secret)
    if not pinned:
        snapshotter._devices = DeviceCopy(COPY_BYTES)
        snapshotter._devices.pin = lambda memory: False  # type: ignore[method-assign]
    rows = []

    def begin(at: int) -> None:
        snapshotter.begin(at, {"step": at}, bench.engine.state())

    for number in range(rounds + 2):  # the first two make memory known to the driver
        bare = [bench.one()[0] for _ in range(LEAST)]
        while not snapshotter.ready():
            time.sleep(0.01)
        began, step = time.perf_counter(), bench.step
        first, stall = bench.one(begin=begin, gate=lambda: snapshotter.gate() and None)
        times = [first]
        while snapshotter.protected != step:
            assert not snapshotter.failure, snapshotter.failure
            times.append(bench.one()[0])
        row = {"way": name, "bare_s": statistics.median(bare), "stall_s": stall, "copy_s": snapshotter.copy_s, "times": times, "safe_s": time.perf_counter() - began}
        if number > 1:
            rows.append(row)
            print({key: value for key, value in row.items() if key != "times"}, len(times), "steps meanwhile", flush=True)
    snapshotter.close()
    return rows


def _theirs(bench: Bench, folder: str, *, rounds: int) -> list[dict[str, Any]]:
    """What torch's async_save does: its stager, used again and with its memory pinned, and then `save` in a thread.

    async_save itself refuses a process whose group has no backend for the CPU.
    """
    stager = DefaultStager(StagingOptions(True, False, True, True))
    rows, staged, saved = [], list[Any](), list[Any]()
    pool = ThreadPoolExecutor(1)

    def store(stage: Any) -> None:
        save(stage.result() if isinstance(stage, Future) else stage, checkpoint_id=f"{folder}/save", no_dist=True)

    def begin(_: int) -> None:
        staged.append(stager.stage({piece.tensor: tensor for piece, tensor in bench.engine.state().items()}))
        saved.append(pool.submit(store, staged[-1]))

    def gate() -> None:
        if isinstance(staged[-1], Future):
            staged[-1].result()

    for number in range(rounds + 1):
        bare = [bench.one()[0] for _ in range(LEAST)]
        began = time.perf_counter()
        first, stall = bench.one(begin=begin, gate=gate)
        times = [first]
        while not saved[-1].done():
            times.append(bench.one()[0])
        saved[-1].result()
        row = {"way": THEIRS, "bare_s": statistics.median(bare), "stall_s": stall, "copy_s": None, "times": times, "safe_s": time.perf_counter() - began}
        if number:
            rows.append(row)
            print({key: value for key, value in row.items() if key != "times"}, len(times), "steps meanwhile", flush=True)
    return rows


def _markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        "# One GPU", "", f"{machine['card']}, {machine['cores']} cores, torch {machine['torch']}, one rank, bf16 with fp32 state (`python -m benchmarks.gpu`).", "",
        "| model | parameters | batch | step, ms | tokens/s | MFU | memory, GB | first step, s |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, f in report["speed"].items():
        lines.append(
            f"| {name} | {f['params'] / 1e6:.0f} M | {f['batch']} x {f['seq_len']} | {f['step_s'] * 1e3:.0f} | {f['tokens_per_s']:,.0f} "
            f"| {f['mfu']:.1%} | {'-' if f['memory_bytes'] is None else format(f['memory_bytes'] / 1e9, '.1f')} | {f['first_step_s']:.1f} |"
        )
    for preset, found in report["snapshots"].items():
        lines += [
            "", f"## A snapshot of {preset}: {found['params'] / 1e6:.0f} M parameters, {found['state_bytes'] / 1e9:.2f} GB of state", "",
            "Ours is protected against the loss of a node, by parity over four vaults on the same machine"
            + ("; the other way writes into a tmpfs" if any(row["way"] == THEIRS for row in found["rows"]) else "") + ". Medians.", "",
            "| way | a step without, ms | stall, ms | stall, % of a step | copy, GB/s | steps meanwhile are slower by | safe after, s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [_row(way, [row for row in found["rows"] if row["way"] == way], found["state_bytes"]) for way in dict.fromkeys(r["way"] for r in found["rows"])]
    if report.get("incidents"):
        lines += ["", "## A rank that was killed in its backward pass, in a run of `holdfast train`", "", "| " + " | ".join(PARTS) + " |", "| --- " * len(PARTS) + "|"]
        lines += ["| " + " | ".join(_word(incident[part]) for part in PARTS) + " |" for incident in report["incidents"]]
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _row(way: str, rows: list[dict[str, Any]], state: int) -> str:
    bare, stall, safe = (statistics.median(row[key] for row in rows) for key in ("bare_s", "stall_s", "safe_s"))
    slower = statistics.median((sum(row["times"]) - row["stall_s"]) / len(row["times"]) / row["bare_s"] - 1 for row in rows)
    copies = [state / row["copy_s"] / 1e9 for row in rows if row["copy_s"]]
    copy = f"{statistics.median(copies):.1f}" if copies else "-"
    return f"| {way} | {bare * 1e3:.1f} | {stall * 1e3:.1f} | {stall / bare:.1%} | {copy} | {slower:.0%} | {safe:.2f} |"


if __name__ == "__main__":
    main()
