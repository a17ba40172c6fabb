"""Step time of holdfast against a bare torchrun script with the same model, layout and batch, interleaved in one run.

    python benchmarks/step_time.py [--layouts 1x1x1 ...] [--pairs 5] [--steps 40] [--more] [--out benchmarks/results/step_time.json]

    pair i:  bare | off | nodes | on        each a fresh start, the first steps left out
             bare   torchrun: all ranks on one machine
             off    holdfast, all workers on one machine, snapshots off
             nodes  holdfast, every worker on an emulated machine of its own, with its raylet and agent, snapshots off
             on     the same with snapshots
    ratio:   the median over the pairs of (median step of holdfast / median step of bare)

The goal is for `off`, which has the processes that a machine has; `nodes` puts those of several machines onto this one.

Holdfast is what `holdfast train` runs: controller, raylets, vaults, W&B offline; its step times are those of
`metrics.jsonl`. The bare side is `step_time_bare.py`. Order within a pair turns with the pairs. The processor column is
that of all processes below the command, per step, and is disturbed less by what else the machine does. Each holdfast run
also says where the seconds from its command to its first step went; the medians are printed below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from framework import run_dir

ROOT = Path(__file__).resolve().parent.parent
GOAL = 1.03
LAYOUTS = ("1x1x1", "1x2x1", "2x2x1", "2x2x2")
SIDES = ("bare", "off", "nodes", "on")
TITLES = {"off": "one machine", "nodes": "a machine a rank", "on": "with snapshots"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default="laptop")
    parser.add_argument("--more", action="store_true", help="add the pairs to those that the file has")
    parser.add_argument("--every", default="auto", help="steps between snapshots on the side that takes them")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "step_time.json")
    options = parser.parse_args(argv)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for layout in options.layouts:
        before = found.get(layout, []) if options.more else []
        found[layout] = before + [_pair(layout, len(before) + pair, options) for pair in range(options.pairs)]
        found["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        found["run"] = {"model": options.model, "steps": options.steps, "every": options.every, "note": options.note}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(_row(layout, found[layout]), flush=True)
    text = report(found)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def report(found: dict[str, Any]) -> str:
    """The page that is published."""
    rows = [_row(layout, found[layout]) for layout in LAYOUTS if layout in found]
    lines = [
        "# Step time: holdfast against a bare torchrun script\n",
        f"`benchmarks/step_time.py`, model {found['run']['model']}, global batch 8 x 256 tokens, {found['run']['steps']} steps a run, the first "
        f"quarter left out; {found['machine']}. Medians over the pairs; in brackets the smallest and largest pair. Goal: {GOAL}.\n",
        "| layout (pp x dp x tp) | pairs | bare ms | " + " | ".join(TITLES.values()) + " | " + ", processor | ".join(TITLES.values())
        + ", processor | one machine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "\n" + found["run"].get("note", ""),
        "\nOne machine: all ranks on one node, as torchrun has them, snapshots off. A machine a rank: as many emulated nodes, each with its "
        "raylet and agent, on the same cores. With snapshots: the same, `fault_tolerance.every_steps=" + found["run"]["every"] + "`. Processor: seconds of all processes of the run per step, as a "
        "ratio to the bare ranks' own.\n",
        "## From the command to the first step, seconds (medians)\n",
        "| layout | total | " + "parts |",
        "| --- | --- | --- |",
    ]
    for layout in LAYOUTS:
        if layout in found:
            starts = [pair[side]["startup"] for pair in found[layout] for side in SIDES[1:] if side in pair]
            parts = {name: statistics.median(s.get(name, 0.0) for s in starts) for name in starts[0]}
            words = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.01)
            lines.append(f"| {layout} | {statistics.median(sum(s.values()) for s in starts):.1f} | {words} |")
    return "\n".join(lines) + "\n"


def _row(layout: str, pairs: list[dict[str, Any]]) -> str:
    def ratios(side: str, what: str) -> list[float]:
        return [pair[side][what] / pair["bare"][what] for pair in pairs if side in pair]

    def cell(values: list[float]) -> str:
        if not values:
            return "as one"
        return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"

    off, bare = ratios("off", "step_s"), statistics.median(pair["bare"]["step_s"] for pair in pairs)
    verdict = "met" if statistics.median(off) <= GOAL else "missed"
    cells = [cell(ratios(side, what)) for what in ("step_s", "cpu_s") for side in TITLES] + [verdict]
    return f"| {layout} | {len(pairs)} | {1e3 * bare:.1f} | " + " | ".join(cells) + " |"


def _pair(layout: str, pair: int, options: argparse.Namespace) -> dict[str, Any]:
    sides = [side for side in SIDES if side != "nodes" or layout != "1x1x1"]
    order = [*sides[pair % len(sides) :], *sides[: pair % len(sides)]]
    return {side: (_bare if side == "bare" else _holdfast)(layout, side, options) for side in order}


def _bare(layout: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    pp, dp, tp = (int(degree) for degree in layout.split("x"))
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "times.json"
        words = {"pp": pp, "dp": dp, "tp": tp, "microbatches": 2 * pp if pp > 1 else 1, "steps": options.steps}
        words |= {"global-batch": 8, "seq-len": 256, "model": json.dumps(_model(options.model)), "out": out}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(pp * dp * tp)]
        command += [str(ROOT / "benchmarks" / "step_time_bare.py"), *(w for k, v in words.items() for w in (f"--{k}", str(v)))]
        _run(command)
        told = json.loads(out.read_text())
    return {"step_s": _median(told["times"]), "cpu_s": told["cpu_s"] / (options.steps - options.steps // 4)}


def _holdfast(layout: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    pp, dp, tp = layout.split("x")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        words = [f"model={options.model}", "data=synthetic", "data.seq_len=256", f"layout.pp={pp}", f"layout.dp={dp}", f"layout.tp={tp}"]
        world = int(pp) * int(dp) * int(tp)
        words += [f"cluster.num_nodes={1 if side == 'off' else world}", f"cluster.workers_per_node={world if side == 'off' else 1}"]
        words += [f"optim.num_steps={options.steps}", "monitor.eval_samples=0"]
        words += ["optim.global_batch=8", f"run_dir={directory}", "monitor.sample_bytes=0"]
        words += [f"fault_tolerance.every_steps={options.every}"] if side == "on" else ["fault_tolerance=off"]
        if world == 1 and side == "on":
            words += ["fault_tolerance.tolerate=0"]
        with _Processor(lambda: len(_rows(directory)), options.steps // 4, options.steps) as processor:
            _run([sys.executable, "-m", "launch.main", "train", *words])
        rows = _rows(directory)
        started = next(event for event in run_dir.events(directory) if event["kind"] == "startup")
    return {"step_s": _median([row["step_time_s"] for row in rows]), "cpu_s": processor.seconds_each, "startup": started["parts"]}


def _median(times: list[float]) -> float:
    return statistics.median(times[len(times) // 4 :])


def _rows(directory: Path) -> list[dict[str, Any]]:
    return run_dir.metrics(directory) if (directory / "metrics.jsonl").exists() else []


def _model(name: str) -> dict[str, Any]:
    import yaml

    values = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    return {k: v for k, v in values.items() if k != "_target_"} | {"vocab_size": values["vocab_size"] or 256}


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


class _Processor:
    """Processor seconds per step of everything below this process, between two numbers of steps."""

    def __init__(self, steps: Callable[[], int], first: int, last: int) -> None:
        self._steps, self._first, self._last = steps, first, last
        self._marks: list[tuple[int, float]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Processor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def seconds_each(self) -> float:
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(1, last - first)

    def _watch(self) -> None:
        while not self._ending.wait(0.4):
            steps = self._steps()
            if self._first <= steps < self._last:
                self._marks.append((steps, _spent()))


def _spent() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
