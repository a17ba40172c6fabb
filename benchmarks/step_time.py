"""Step time of holdfast against a bare torchrun script with the same model, layout and batch, interleaved in one run.

    python benchmarks/step_time.py [--layouts 1x1x1 ...] [--pairs 5] [--steps 20] [--more] [--out benchmarks/results/step_time.json]

    bare | off | bare | nodes | bare | on | bare | ...        each a fresh start, the first steps left out

             bare   torchrun: all ranks on one machine
             off    holdfast, all workers on one machine, snapshots off
             nodes  holdfast, every worker on an emulated machine of its own, with its raylet and agent, snapshots off
             on     the same with snapshots
    ratio:   the median over the pairs of (median step of holdfast / mean of the median steps of the bare runs before and after)
    control: the same for a bare run and the bare run before it: what the machine alone makes of equal things
    beside:  processor seconds of all processes of the run that are no rank, as a share of the ranks' own in the same run, which no
             change of the machine's speed disturbs; where ranks keep all cores busy, their steps take longer by so much

The goal is for `off`, which has the processes that a machine has; `nodes` puts those of several machines onto this one.

Holdfast is what `holdfast train` runs: controller, raylets, vaults, W&B offline; its step times are those of
`metrics.jsonl`. The bare side is `step_time_bare.py`. Which side follows which turns with the pairs. Each holdfast run
also says where the seconds from its command to its first step went; the medians are printed below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from framework import run_dir

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ROOT / "benchmarks" / "results" / "step_time_beside.md"  # what the page says of single processes, sampled by hand
GOAL = 1.03
LAYOUTS = ("1x1x1", "1x2x1", "2x2x1", "2x2x2")
SIDES = {"off": "one machine", "nodes": "a machine a rank", "on": "with snapshots"}
Found = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", default=tuple(SIDES), choices=tuple(SIDES))
    parser.add_argument("--model", default="laptop")
    parser.add_argument("--more", action="store_true", help="add the pairs to those that the file has")
    parser.add_argument("--every", default="auto", help="steps between snapshots on the side that takes them")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "step_time.json")
    options = parser.parse_args(argv)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for layout in options.layouts:
        before = found.get(layout) if options.more else None
        found[layout] = before or {side: [] for side in SIDES} | {"control": []}
        found["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        found["run"] = {"model": options.model, "steps": options.steps, "every": options.every, "note": options.note}
        for _ in _rounds(layout, found[layout], options):
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(_row(layout, found[layout]), flush=True)
    text = report(found)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def report(found: Found) -> str:
    """The page that is published."""
    lines = [
        "# Step time: holdfast against a bare torchrun script\n",
        f"`benchmarks/step_time.py`, model {found['run']['model']}, global batch 8 x 256 tokens, {found['run']['steps']} steps a run, the first "
        f"quarter left out; {found['machine']}. Medians over the pairs; in brackets the smallest and the largest. Goal: {GOAL} on one machine.\n",
        "| layout (pp x dp x tp) | pairs | bare ms | control | " + " | ".join(SIDES.values()) + " | "
        + " | ".join(f"beside: {title}" for title in SIDES.values()) + " | goal |",
        "|" + " --- |" * (5 + 2 * len(SIDES)),
        *(_row(layout, found[layout]) for layout in LAYOUTS if layout in found),
        "\n" + found["run"].get("note", ""),
        "\nControl: a bare run against the bare run before it. One machine: all ranks on one node, as torchrun has them, snapshots off. A "
        "machine a rank: as many emulated nodes, each with its raylet and agent, on the same cores. With snapshots: the same, "
        f"`fault_tolerance.every_steps={found['run']['every']}`. Beside: processor time of all that is no rank, in percent of the ranks'.\n",
        "## From the command to the first step, seconds (medians)\n",
        "| layout | total | " + "parts |",
        "| --- | --- | --- |",
    ]
    for layout in LAYOUTS:
        starts = [run["startup"] for side in SIDES for run in found.get(layout, {}).get(side, [])]
        if starts:
            parts = {name: statistics.median(s.get(name, 0.0) for s in starts) for name in starts[0]}
            words = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.01)
            lines.append(f"| {layout} | {statistics.median(sum(s.values()) for s in starts):.1f} | {words} |")
    if BESIDE.exists():
        lines += ["", BESIDE.read_text().rstrip()]
    return "\n".join(lines) + "\n"


def _row(layout: str, found: Found) -> str:
    def cell(values: list[float], form: str = ".3f") -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "-"

    runs = {side: found[side] for side in SIDES}
    bare = [run["bare_s"] for side in SIDES for run in runs[side]]
    ratios = {side: [run["step_s"] / run["bare_s"] for run in runs[side]] for side in SIDES}
    cells = [str(max(map(len, runs.values()))), f"{1e3 * statistics.median(bare):.1f}", cell(found["control"])]
    cells += [cell(ratios[side]) for side in SIDES]
    cells += [cell([100 * run["beside"] for run in runs[side] if run["beside"] is not None], ".1f") for side in SIDES]
    verdict = "-" if not ratios["off"] else "met" if statistics.median(ratios["off"]) <= GOAL else "missed"
    return f"| {layout} | " + " | ".join([*cells, verdict]) + " |"


def _rounds(layout: str, found: Found, options: argparse.Namespace) -> Iterator[None]:
    """Fill in the runs of a layout, one after the other."""
    sides = [side for side in options.sides if side != "nodes" or layout != "1x1x1"]
    before = _bare(layout, options)
    for pair in range(options.pairs):
        turn = pair % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            run = _holdfast(layout, side, options)
            after = _bare(layout, options)
            found[side].append(run | {"bare_s": (before + after) / 2})
            found["control"].append(after / before)
            before = after
            yield


def _bare(layout: str, options: argparse.Namespace) -> float:
    """Median seconds of a step."""
    pp, dp, tp = (int(degree) for degree in layout.split("x"))
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "times.json"
        words = {"pp": pp, "dp": dp, "tp": tp, "microbatches": 2 * pp if pp > 1 else 1, "steps": options.steps}
        words |= {"global-batch": 8, "seq-len": 256, "model": json.dumps(_model(options.model)), "out": out}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(pp * dp * tp)]
        command += [str(ROOT / "benchmarks" / "step_time_bare.py"), *(w for k, v in words.items() for w in (f"--{k}", str(v)))]
        _run(command)
        told = json.loads(out.read_text())
    return _median(told["times"])


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
        with _Processor(lambda: _lines(directory), options.steps // 4, options.steps - max(2, options.steps // 8), ranks=world) as processor:
            _run([sys.executable, "-m", "launch.main", "train", *words])
        rows = _rows(directory)
        started = next(event for event in run_dir.events(directory) if event["kind"] == "startup")
    return {"step_s": _median([row["step_time_s"] for row in rows]), "beside": processor.beside, "startup": started["parts"]}


def _median(times: list[float]) -> float:
    return statistics.median(times[len(times) // 4 :])


def _rows(directory: Path) -> list[dict[str, Any]]:
    return run_dir.metrics(directory) if (directory / "metrics.jsonl").exists() else []


def _lines(directory: Path) -> int:
    """Rows so far, counted cheaply: whoever looks does so on the cores that are measured."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


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
    """Processor seconds of everything below this process between two numbers of steps; looked at twice, for looking costs, too."""

    def __init__(self, steps: Callable[[], int], first: int, last: int, *, ranks: int) -> None:
        self._steps, self._first, self._last, self._ranks = steps, first, last, ranks
        self._marks: list[dict[int, float]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Processor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def beside(self) -> float:
        """What all processes but the busiest, which are the ranks, have spent, as a share of what those have."""
        before, after = self._marks[0], self._marks[-1]
        spent = sorted((seconds - before.get(pid, 0.0) for pid, seconds in after.items()), reverse=True)
        return sum(spent[self._ranks :]) / sum(spent[: self._ranks])

    def _watch(self) -> None:
        for bound in (self._first, self._last):
            while self._steps() < bound:
                if self._ending.wait(0.2):
                    return
            self._marks.append(_spent())


def _spent() -> dict[int, float]:
    """Seconds by process, from the scheduler's own account: the ticks of others are too coarse for what sleeps most of the time."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            tasks = Path(f"/proc/{process.pid}/task").iterdir()
            found[process.pid] = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    return found


if __name__ == "__main__":
    main()
