"""A run on four hosts with networks of their own, whose ways are made slow, dropped and cut, and one of which crashes.

    python -m benchmarks.network [--only slow way cut crash] [--steps 150]

Hosts are network namespaces (`benchmarks/hosts.py`, needs root), on them a Ray cluster as `ray start` makes it
(`benchmarks/ray_cluster.py`) with Ray's own patience, and on that `holdfast train cluster.address=...`, typed on host 0.

    slow     what host 1 sends to host 2 passes at 2 Mbit/s        which verdict names the way
    way      what host 1 sends to host 2 is lost                   which way is named, who is left out, and when it is taken back
    cut      host 2 is cut off in silence, and comes back later    detection, first new step; what comes back is fenced
    crash    every process of host 3 is gone, its memory with it   the same

Seconds are from the fault: `told` until the run's trouble event or verdict, `step` until the first new step was seen. What must hold
(`_lacks`) is checked: with anything lacking the exit code is 1. Results go to `benchmarks/results/hosts.{json,md}`; those of faults that
were not run now stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hosts import Boxes, why_not
from benchmarks.ray_cluster import RayCluster
from framework import run_dir

RESULTS = Path(__file__).parent / "results"
HOLDFAST = str(Path(sys.executable).parent / "holdfast")
FAULTS = ("slow", "way", "cut", "crash")
AT_STEP, LIMIT_S = 25, 200.0
HOLDS_S = {"way": 20.0}  # of training on with the fault still there; others are undone after 3 s of it
NOTES = (
    "One run each, at a load of 5 to 20 on two cores, not all on one day; the seconds of `cut` are the incident's own, from the last word of",
    "the host that was cut off. `slow`: the records name the group whose collectives take long, the pair test the way, and its far end is left",
    "out. `way`, while nothing else heavy ran: in a collective of four ranks the records do not show which way lost its message, so the machines",
    "ask each other; it stays dead for 20 s of training on three hosts, and then the fourth is taken back. Most of the seconds until it is told",
    "are the deadline of a hang (`detect.hang_timeout_s`, 15 s here).",
)
LEAST_STEPS = {"way": 300}  # so that the run lasts until the machine that was left out is back


def main() -> None:
    """Run the faults, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--keep", action="store_true", help="leave the run directories below /tmp/hfnet*")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    missing = why_not()
    if missing is not None:
        sys.exit(missing)
    rows = []
    with Boxes(4) as boxes, RayCluster(boxes=boxes) as ray:
        for fault in options.only:
            rows.append(_one(fault, boxes, ray, options))
            print(json.dumps(rows[-1], indent=1), flush=True)
    if not options.dry:
        file = RESULTS / "hosts.json"
        fresh = {row["fault"] for row in rows}
        rows += [row for row in (json.loads(file.read_text()) if file.exists() else []) if row["fault"] not in fresh]
        rows.sort(key=lambda row: FAULTS.index(row["fault"]))
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "hosts.md").write_text(markdown(rows))
    print(markdown(rows))
    sys.exit("\n".join(f"{row['fault']}: {lack}" for row in rows for lack in row.get("lacks", ())) or 0)


def _one(fault: str, boxes: Boxes, ray: RayCluster, options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="hfnet"))
    run = folder / "run"
    act, undo = _acts(boxes, ray)[fault]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(ray.command(0, _words(ray, run, max(options.steps, LEAST_STEPS.get(fault, 0)))), env=ray.env, cwd=folder, stdout=said, stderr=said)
    try:
        _until(process, lambda: len(_rows(run)) >= AT_STEP)
        generation, wall, began = _rows(run)[-1]["generation"], time.time(), time.monotonic()
        act()
        new_s = undone_s = None
        meanwhile = 0
        while process.poll() is None and time.monotonic() - began < LIMIT_S:
            fresh = any(row["generation"] > generation for row in _rows(run))
            if fresh and new_s is None:
                new_s = time.monotonic() - began
            if undone_s is None and ((new_s is not None and time.monotonic() - began > new_s + HOLDS_S.get(fault, 3.0)) or time.monotonic() - began > 60):
                undone_s, meanwhile = time.monotonic() - began, sum(row["generation"] > generation for row in _rows(run))
                undo()
            time.sleep(0.05)
        row = _judged(fault, run, wall, new_s, process.poll(), (folder / "said").read_text(errors="replace"))
        row |= {"undone_s": undone_s, "steps_meanwhile": meanwhile}
        return row | {"lacks": _lacks(row, boxes)}
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _acts(boxes: Boxes, ray: RayCluster) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    def nothing() -> None:
        """It heals by itself, or not at all."""

    return {
        "slow": (lambda: boxes.slow_way(1, 2, "2mbit"), lambda: boxes.fast_again(1)),
        "way": (lambda: boxes.drop_way(1, 2), lambda: boxes.restore_way(1, 2)),
        "cut": (lambda: boxes.cut(2), lambda: boxes.join(2)),
        "crash": (lambda: ray.crash(3), nothing),
    }


def _words(ray: RayCluster, run: Path, steps: int) -> list[str]:
    values = {
        "model": "tiny", "data": "synthetic", "optim.num_steps": steps, "optim.global_batch": 12, "monitor": "quiet",
        "cluster.address": ray.address, "cluster.num_nodes": 4, "cluster.min_nodes": 1, "layout.pp": 1, "layout.dp": 4,
        "layout.tp": 1, "fault_tolerance.every_steps": 1, "run_dir": run,
    }  # fmt: skip
    return [HOLDFAST, "train", *(f"{key}={value}" for key, value in values.items())]


def _judged(fault: str, run: Path, wall: float, new_s: float | None, code: int | None, said: str) -> dict[str, Any]:
    events = [e for e in run_dir.events(run) if e["time"] >= wall and (e["kind"] in ("verdict", "trouble") or e.get("cause") in ("left_out", "way"))]
    summary = run_dir.summary(run) or {}
    incidents = summary.get("incidents", ())
    return {
        "fault": fault,
        "told_s": round(events[0]["time"] - wall, 2) if events else None,
        "told": [f"{e['time'] - wall:.1f} s, {e['kind']} {e.get('cause', '')}: {e['reason']}" for e in events],
        "new_s": None if new_s is None else round(new_s, 2),
        "steps_lost": max((i["steps_lost"] for i in incidents), default=0),
        "layouts": _layouts(run),
        "ledger": _ledger(run, summary),
        "status": summary.get("status"),
        "exit_code": code,
        "said": "" if code == 0 else said[-1500:],
    }


def _lacks(row: dict[str, Any], boxes: Boxes) -> list[str]:
    """What must hold and does not."""
    holds = {"it ends well": row["status"] == "finished" and row["exit_code"] == 0, "every sample counts once": row["ledger"] == "exact"}
    if row["fault"] == "way":
        cell = f"way {boxes.address(1)}>{boxes.address(2)}: "
        holds["the cell is named"] = cell in row["told"][0]
        holds["it trains on while the way is dead"] = row["steps_meanwhile"] >= 20
        holds["one machine is left out, and back when the way is"] = row["layouts"] == ["1x4x1", "1x3x1", "1x4x1"]
    return [what for what, held in holds.items() if not held]


def _ledger(run: Path, summary: dict[str, Any]) -> str:
    following = 0
    for row in run_dir.metrics(run):
        if row["samples"][0] != following:
            return f"broken at step {row['step']}"
        following = row["samples"][1] + 1
    return "exact" if following and following == summary.get("samples") else f"{following} of {summary.get('samples')} samples"


def _layouts(run: Path) -> list[str]:
    """Those of the generations that took steps, in order."""
    return list({row["generation"]: row["layout"] for row in run_dir.metrics(run)}.values())


def _until(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run did not get so far, process {process.poll()}")
        time.sleep(0.05)


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return run_dir.metric_rows(run)
    except (OSError, ValueError):
        return []  # not there yet, or a line half written


def markdown(rows: list[dict[str, Any]]) -> str:
    """The results as a table, and what the runs said."""
    lines = [
        "# Four hosts with networks of their own",
        "",
        f"Ray's own health checks, a snapshot every step, layout 1x4x1, {os.cpu_count()} cores for all. Seconds from the fault.",
        "",
        "| fault | told, s | new step, s | steps lost | layouts | samples | ended |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row["fault"], row["told_s"], row["new_s"], row["steps_lost"], " → ".join(row["layouts"]), row["ledger"], row["status"])
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    for row in rows:
        lines += ["", f"`{row['fault']}`:", *(f"- {text[:300]}" for text in row["told"][:6])]
        if row.get("undone_s") is not None:
            lines.append(f"- the fault was undone after {row['undone_s']:.1f} s, with {row['steps_meanwhile']} new steps taken by then")
    return "\n".join([*lines, "", *NOTES]) + "\n"


if __name__ == "__main__":
    main()
