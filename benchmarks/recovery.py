"""From the SIGKILL of a worker, and of a whole node, to the next step: Holdfast, torchrun and Ray Train in turn.

    four emulated nodes with a worker each, 0.9 M parameters, data parallel 4, 12 samples a step; after the node's loss 3

All three train the same model on the same samples; in each, first a worker and then a node (its agent or raylet, and all
below it) is killed from outside, as soon as a chosen step is seen. An observer outside reads the file of steps every
10 ms; its clock alone counts.

    holdfast    holdfast train, snapshots in memory every step
    torchrun    torchrun --max-restarts, elastic from 3 to 4 nodes, FSDP2, a DCP checkpoint every N steps; its rendezvous set
                to notice a lost agent in 3 s and to wait 2 s for more (defaults: 15 s and 30 s)
    ray         Ray Train with elastic workers (2 to 4), the same loop

    python -m benchmarks.recovery [--rounds 3] [--systems holdfast torchrun ray] [--every 20] [--more]

"first step" is the first one that is taken at all, "new step" the first that had not been taken before the kill, "lost" how
many were taken twice. Results go to `benchmarks/results/recovery.{json,md}`; --more adds rounds to those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.ray_cluster import RayCluster, kill_tree
from framework import run_dir
from framework.cluster.machines import CONTROL, Machines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
BIN = Path(sys.executable).parent
LOOP = str(Path(__file__).with_name("recovery_loop.py"))
NODES, VICTIM = 4, 2
BATCH, SEQ_LEN, VOCAB, STEPS = 12, 64, 256, 100_000
WORKER_AT, NODE_AFTER = 33, 37  # no multiples of the interval: on the average a checkpoint is half an interval old
START_S, RECOVER_S = 180.0, 180.0
GOALS = {"first_s": 5.0, "lost": 10.0}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One kill. Seconds from the signal; `lost` steps."""

    system: str
    fault: str
    first_s: float
    new_s: float
    lost: int
    step_s: float


class Steps:
    """A file of steps that grows, seen from outside: who took which step (`life`), and when it was seen."""

    def __init__(self, path: Path, life: str) -> None:
        self._path, self._life, self._tail = path, life, run_dir.Tail(path)
        self.seen: list[tuple[float, int, Any]] = []

    def wait(self, holds: Callable[[], bool], timeout_s: float, alive: Callable[[], bool]) -> None:
        """Read until it holds. Raises RuntimeError when it takes too long or nobody writes any more."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            self._read()
            if time.monotonic() > deadline or not alive():
                raise RuntimeError(f"{self._path}: {'nothing came in time' if alive() else 'the run ended'}; seen {self.seen[-3:]}")
            time.sleep(0.01)

    def _read(self) -> None:
        now = time.monotonic()
        self.seen += [(now, int(row["step"]), row[self._life]) for row in self._tail.new()]

    @property
    def last(self) -> int:
        return self.seen[-1][1] if self.seen else 0


def hurt(system: str, fault: str, steps: Steps, at: int, kill: Callable[[], None], alive: Callable[[], bool]) -> Outcome:
    """Kill when step `at` is seen, and tell what followed."""
    steps.wait(lambda: steps.last >= at, START_S, alive)
    pace = [t for t, _, _ in steps.seen[-21:]]
    before, life, began = len(steps.seen), steps.seen[-1][2], time.monotonic()
    kill()
    steps.wait(lambda: steps.seen[-1][2] != life, RECOVER_S, alive)
    taken = max(step for _, step, who in steps.seen if who == life)  # some of it is seen only after the kill
    first = next((t, step) for t, step, who in steps.seen[before:] if who != life)
    steps.wait(lambda: steps.last > taken, RECOVER_S, alive)
    new = next(t for t, step, who in steps.seen[before:] if who != life and step > taken)
    found = Outcome(
        system, fault, first[0] - began, new - began, taken + 1 - first[1], (pace[-1] - pace[0]) / max(1, len(pace) - 1)
    )
    print(found, flush=True)
    return found


def holdfast(options: argparse.Namespace, folder: Path) -> Iterator[Outcome]:
    """`holdfast train` on four emulated nodes."""
    values = {
        "model": "laptop", "data": "synthetic", "data.seq_len": SEQ_LEN, "data.vocab_size": VOCAB, "optim.num_steps": STEPS,
        "optim.global_batch": BATCH, "cluster.num_nodes": NODES, "cluster.min_nodes": 2, "layout.pp": 1, "layout.dp": NODES,
        "layout.tp": 1, "fault_tolerance.every_steps": 1, "monitor": "quiet", "monitor.progress": "off", "run_dir": folder / "run",
    }  # fmt: skip
    command = [str(BIN / "holdfast"), "train", *(f"{key}={value}" for key, value in values.items())]
    with _process(command, folder, dict(os.environ)) as process:
        steps, alive = Steps(folder / "run" / "metrics.jsonl", "generation"), lambda: process.poll() is None
        steps.wait(lambda: bool(steps.seen), START_S, alive)
        machines = Machines(_control(process.pid))

        def kill_worker() -> None:
            os.kill(_worker_of(machines, f"n{VICTIM}"), signal.SIGKILL)

        yield hurt("holdfast", "worker", steps, WORKER_AT, kill_worker, alive)
        yield hurt("holdfast", "node", steps, steps.last + NODE_AFTER, lambda: void(machines.kill(f"n{VICTIM}")), alive)


def torchrun(options: argparse.Namespace, folder: Path) -> Iterator[Outcome]:
    """Four agents, the first of which hosts the rendezvous."""
    job = _job(options, folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        str(BIN / "torchrun"), f"--nnodes={NODES - 1}:{NODES}", "--nproc-per-node=1", "--max-restarts=100", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=bench", "--local-addr=127.0.0.1", "--monitor-interval=0.1",
        "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2", LOOP, json.dumps(job),
    ]  # fmt: skip
    ours = {
        "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        agents = []
        for node in range(NODES):
            agents.append(stack.enter_context(_process(command, folder, {**os.environ, **ours, "BENCH_NODE": str(node)})))
        steps, alive = Steps(folder / "steps", "life"), lambda: agents[0].poll() is None
        yield hurt("torchrun", "worker", steps, WORKER_AT, lambda: _kill_pid(folder, str(VICTIM)), alive)
        yield hurt("torchrun", "node", steps, steps.last + NODE_AFTER, lambda: kill_tree(agents[VICTIM].pid), alive)
        _saves(folder, steps)


def ray(options: argparse.Namespace, folder: Path) -> Iterator[Outcome]:
    """Ray Train on a cluster of four nodes, started by `ray start`."""
    addresses = [f"127.0.0.{3 + i}" for i in range(NODES)]
    with RayCluster(addresses=addresses) as cluster:
        command = [sys.executable, "-P", LOOP, cluster.address, json.dumps(_job(options, folder))]
        with _process(command, folder, {**cluster.env, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}) as process:
            steps, alive = Steps(folder / "steps", "life"), lambda: process.poll() is None
            yield hurt("ray", "worker", steps, WORKER_AT, lambda: _kill_pid(folder, addresses[VICTIM]), alive)
            yield hurt("ray", "node", steps, steps.last + NODE_AFTER, lambda: cluster.crash(VICTIM), alive)


SYSTEMS = {"holdfast": holdfast, "torchrun": torchrun, "ray": ray}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--every", type=int, default=20, help="steps between the checkpoints of torchrun and Ray Train")
    parser.add_argument("--more", action="store_true", help="add to the rounds that were measured before")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    outcomes: list[dict[str, Any]] = []
    if options.more and (RESULTS / "recovery.json").exists():
        outcomes = json.loads((RESULTS / "recovery.json").read_text())["outcomes"]
    for number in range(options.rounds):
        turn = options.systems[number % len(options.systems) :] + options.systems[: number % len(options.systems)]
        for system in turn:
            folder = Path(tempfile.mkdtemp(prefix="hfrec"))
            (folder / "pids").mkdir()
            try:
                outcomes += [asdict(outcome) for outcome in SYSTEMS[system](options, folder)]
            except RuntimeError as error:
                print(f"{system}: {error}\n{(folder / 'log').read_text(errors='replace')[-2000:]}", flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            if not options.dry:
                _write(outcomes, options.every)
    print(markdown(_report(outcomes, options.every)))


def _report(outcomes: list[dict[str, Any]], every: int) -> dict[str, Any]:
    import torch

    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(), "torch": torch.__version__}
    return {"machine": machine, "every": every, "outcomes": outcomes}


def _write(outcomes: list[dict[str, Any]], every: int) -> None:
    report = _report(outcomes, every)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recovery.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "recovery.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The results as a table, with the goals."""
    rows, every = report["outcomes"], report["every"]
    lines = [
        "# From SIGKILL to the next step",
        "",
        "Four emulated nodes with a worker each, 0.9 M parameters, data parallel 4, 12 samples a step. Seconds from the signal; medians,",
        f"with the least and the most; {', '.join(f'{k} {v}' for k, v in report['machine'].items())}.",
        f"torchrun and Ray Train save a DCP checkpoint every {every} steps; holdfast keeps a snapshot of every step in memory.",
        "",
        "| killed | system | runs | first step, s | new step, s | steps lost | step time before, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fault in ("worker", "node"):
        for system in SYSTEMS:
            found = [row for row in rows if (row["fault"], row["system"]) == (fault, system)]
            if found:
                cells = [_spread([row[key] for row in found]) for key in ("first_s", "new_s", "lost")]
                pace = statistics.median(row["step_s"] for row in found)
                lines.append(f"| {fault} | {system} | {len(found)} | {' | '.join(cells)} | {pace:.3f} |")
    return "\n".join([*lines, "", *_goals(rows)]) + "\n"


def _goals(rows: list[dict[str, Any]]) -> Iterator[str]:
    for fault in ("worker", "node"):
        for peer in ("torchrun", "ray"):
            ours = {key: _median(rows, fault, "holdfast", key) for key in ("new_s", "lost")}
            theirs = {key: _median(rows, fault, peer, key) for key in ("new_s", "lost")}
            if None in (*ours.values(), *theirs.values()):
                continue
            speed = theirs["new_s"] / max(ours["new_s"], 1e-9)
            fast, few = speed >= 5, ours["lost"] <= theirs["lost"] / 10
            yield (
                f"- {fault} killed, against {peer}: {speed:.1f}x faster to a new step ({_met(fast)}: at least 5x), "
                f"{ours['lost']:g} against {theirs['lost']:g} steps lost ({_met(few)}: at most a tenth)"
            )


def _met(held: bool) -> str:
    return "met" if held else "**missed**"


def _median(rows: list[dict[str, Any]], fault: str, system: str, key: str) -> Any:
    values = [row[key] for row in rows if (row["fault"], row["system"]) == (fault, system)]
    return statistics.median(values) if values else None


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = yaml.safe_load((ROOT / "configs" / "model" / "laptop.yaml").read_text())
    model = {k: v for k, v in model.items() if not k.startswith("_")} | {"vocab_size": VOCAB}
    data = {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "val_fraction": 0.02, "num_samples": 65536, "noise": 0.125}
    return {
        "folder": str(folder), "model": model, "data": data, "batch": BATCH, "steps": STEPS, "every": options.every, "lr": 1e-3,
        "nodes": NODES,
    }  # fmt: skip


@contextlib.contextmanager
def _process(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def _control(pid: int) -> str:
    """The control socket of the local cluster below a process."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if control := child.environ().get(CONTROL):
                return control
    raise RuntimeError("holdfast: no local cluster is there")


def _worker_of(machines: Machines, node: str) -> int:
    """The process on a node that trains: its output goes to the log of a generation."""
    for pid in machines.pids(node):
        with contextlib.suppress(OSError):
            if f"_{node}.0.log" in os.readlink(f"/proc/{pid}/fd/1") and "/g0" in os.readlink(f"/proc/{pid}/fd/1"):
                return pid
    raise RuntimeError(f"holdfast: no worker lives on {node}")


def _kill_pid(folder: Path, node: str) -> None:
    os.kill(int((folder / "pids" / node).read_text()), signal.SIGKILL)


def _saves(folder: Path, steps: Steps) -> None:
    took = [float(line) for line in (folder / "saves").read_text().split()]
    print(f"a checkpoint took {statistics.median(took):.3f} s", flush=True)


def void(_: object) -> None:
    """For a call whose answer does not matter."""


if __name__ == "__main__":
    main()
