"""What snapshots cost training: no snapshots, ours, torch.save, dcp.save, dcp.async_save by thread and by process.

    two data-parallel ranks train; ours has two vaults, each as busy as on a machine of its own, on the same cores
    a round = a block of steps for every way, in turn, each round starting with another one

"stall" is what a step waits in the call and before the optimizer, by the slowest rank; "extra" is what a block took
longer than the steps of the round's blocks without snapshots, all waiting at the block's end included, by snapshot.
The others write into a tmpfs, without disk and without parity; ours is protected against the loss of a node.

    python -m benchmarks.snapshot [--presets 20m] [--rounds 4] [--ways ...] [--steps 10]

It writes `benchmarks/results/snapshot.json` and `.md`, the goals that are missed included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.vaults import vaults
from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault_client import VaultClient
from framework.model import Decoder
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
WAYS = ("none", "holdfast", "torch.save", "dcp.save", "async_save thread", "async_save process")
VOCAB = 259
NODES = ("n0", "n1")
FORM = 2  # of a result: what is measured, and how


def main() -> None:
    """Measure, print, and write the results; presets that are not measured keep their last figures, if measured alike."""
    options = _options()
    file = options.out / "snapshot.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    report = {preset: found for preset, found in known.items() if found.get("form") == FORM}
    for preset in options.presets:
        report[preset] = _preset(preset, options)
    options.out.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "snapshot.md").write_text(_markdown(report))
    print(_markdown(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["20m"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block with one snapshot")
    parser.add_argument("--every-step", type=int, default=4, help="steps of a block with a snapshot each; 0: none")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="sequences of each rank and step")
    parser.add_argument("--seconds", type=float, default=400.0, help="no round begins after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _preset(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    values = yaml.safe_load((ROOT / "configs" / "model" / f"{preset}.yaml").read_text())
    model = {key: value for key, value in values.items() if not key.startswith("_")} | {"vocab_size": VOCAB}
    with torch.device("meta"):
        whole = Decoder(**model)
    atlas = Atlas(state_specs(whole), Layout(dp=2), "1f1b", model["num_layers"])
    run, secret = "bench" + secrets.token_hex(4), secrets.token_bytes(16)
    with vaults(NODES, run=run, secret=secret) as (addresses, pids):
        plan = SnapshotPlan(
            run=run,
            generation=1,
            atlas=atlas,
            seats=NODES,
            groups=plan_groups(dict.fromkeys(NODES), tolerate=1, group_size=2),
            addresses=addresses,
            chunk_bytes=4 << 20,
            scrub_bytes_s=16e6,
        )
        clients = [VaultClient(address, run=run, secret=secret) for address in addresses.values()]
        for client in clients:
            client.open(plan)
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-") as folder:
            rows = _ranks(_job(plan, secret, model, folder, options) | {"vaults": pids})
        seconds = [e for c in clients for e in c.watch(0) if e["kind"] == "snapshot" and e["state"] == "protected"]
    state = sum(plan.node_bytes(node) for node in NODES)
    parts = {k: statistics.median(e[k] for e in seconds) for k in ("copy_s", "hash_s", "encode_s", "total_s")}
    return {"form": FORM, "machine": _machine(), "rounds": 1 + max(row["round"] for row in rows), "state": state, "vaults": parts, "rows": rows,
            "tokens": 2 * options.batch * options.seq_len}  # fmt: skip


def _job(plan: SnapshotPlan, secret: bytes, model: dict[str, Any], folder: str, options: argparse.Namespace) -> dict[str, Any]:
    blocks = [(options.steps, options.steps)] + ([(1, options.every_step)] if options.every_step else [])
    return {
        "plan": plan.to_json(), "secret": secret.hex(), "model": model, "folder": folder, "out": f"{folder}/rows.json",
        "rounds": options.rounds, "ways": options.ways, "blocks": blocks, "port": _port(),
        "batch": options.batch, "seq_len": options.seq_len, "seconds": options.seconds,
    }  # fmt: skip


def _ranks(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run both ranks to their end. Raises RuntimeError if one fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    file = Path(job["folder"]) / "job.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).with_name("snapshot_rank.py"))]
    ranks = [subprocess.Popen([*command, str(rank), str(file)], env=environment) for rank in range(2)]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.2)
        if any(rank.poll() for rank in ranks):
            raise RuntimeError("a rank failed; its output is above")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    rows: list[dict[str, Any]] = json.loads(Path(job["out"]).read_text())
    return rows


def _port() -> int:
    """Two free ports in a row, most likely."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _machine() -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1)
    return {"cores": os.cpu_count(), "load": load, "python": platform.python_version(), "torch": torch.__version__}


def cells(found: dict[str, Any], way: str, every: str) -> dict[str, float] | None:
    """Medians over rounds of one way at one interval, against the blocks without snapshots right before and after each.

    Seconds of a step, of stall and extra time by snapshot, extra processor seconds by snapshot, share of time lost, and
    the part of the snapshots due that were taken.
    """
    rows, places = found["rows"], range(len(found["rows"]))
    mine = [i for i in places if rows[i]["way"] == way and (rows[i]["every"] == 1) == (every == "every step")]
    if not mine:
        return None
    extra, cpu, lost = [], [], []
    for i in mine:
        row, quiet = rows[i], [rows[j] for j in (i - 1, i + 1) if j in places and rows[j]["way"] == "none"]
        share = row["steps"] / sum(r["steps"] for r in quiet) if quiet else math.nan
        base = sum(r["seconds"] for r in quiet) * share
        extra.append((row["seconds"] - base) / max(1, row["number"]))
        cpu.append((row["cpu"] - sum(r["cpu"] for r in quiet) * share) / max(1, row["number"]))
        lost.append(row["seconds"] / base - 1)
    due = sum(len(range(0, rows[i]["steps"], rows[i]["every"])) for i in mine)
    return {
        "step": statistics.median(t for i in mine for t in rows[i]["times"]),
        "stall": statistics.median(rows[i]["stall"] for i in mine),
        "extra": statistics.median(extra),
        "spread": statistics.quantiles(extra)[2] - statistics.quantiles(extra)[0] if len(extra) > 1 else math.nan,
        "cpu": statistics.median(cpu),
        "lost": statistics.median(lost),
        "taken": sum(rows[i]["number"] for i in mine) / due,
    }


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# What snapshots cost training",
        "",
        "Two data-parallel ranks and two vaults on the same two cores, one thread each. Each block of steps with snapshots",
        "lies between two without; medians over interleaved rounds, and the middle half of them as the spread of `extra`.",
        "stall: what one step waits for one snapshot, by the slowest rank, in the call and before the optimizer. extra: how",
        "much longer training took, by snapshot, until all was written (ours: protected on both nodes). processor: how much more",
        "of it all processes used. The others write into a tmpfs: no disk, no parity. Both cores are full without any snapshot, so",
        "whatever is computed for one is taken from training; on a machine with a core to spare it is not. Whether there is room",
        "for a snapshot is asked as a run does, in the all-reduce that every step has; one that finds none is left out.",
    ]
    for preset, found in report.items():
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        parts = ", ".join(f"{k.removesuffix('_s')} {v:.2f} s" for k, v in found["vaults"].items())
        title = f"## {preset}: {found['state'] / 1e6:.0f} MB of state, {found['tokens']} tokens a step"
        lines += ["", title, "", f"{found['rounds']} rounds; {machine}. Ours in the vaults: {parts}.", ""]
        lines += [*_table(found), "", *_goals(found)]
    return "\n".join(lines) + "\n"


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| | interval | step s | stall ms | stall / step | extra s | spread | processor s | slowdown |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = cells(found, "none", "every 10")
    for every in ("every 10", "every step"):
        for way in WAYS[1:]:
            cell = cells(found, way, every)
            if cell is not None and base is not None:
                share = cell["stall"] / base["step"]
                taken = "" if cell["taken"] == 1 else f", {cell['taken']:.0%} taken"
                lines.append(
                    f"| {way} | {every}{taken} | {cell['step']:.3f} | {1e3 * cell['stall']:.1f} | {share:.2%} "
                    f"| {cell['extra']:.3f} | {cell['spread']:.3f} | {cell['cpu']:.3f} | {cell['lost']:+.1%} |"
                )
    if base is not None:
        lines.append(f"| none | – | {base['step']:.3f} | – | – | – | – | – | – |")
    return lines


def _goals(found: dict[str, Any]) -> list[str]:
    base, ours = cells(found, "none", "every 10"), cells(found, "holdfast", "every 10")
    if base is None or ours is None:
        return []
    share = ours["stall"] / base["step"]
    lines = [f"- stall at every 10 steps under 1% of the step: {share:.2%}, {'met' if share < 0.01 else '**missed**'}"]
    for way in ("async_save thread", "async_save process"):
        theirs = cells(found, way, "every 10")
        if theirs is not None and theirs["extra"] > 0:
            ratio = ours["extra"] / theirs["extra"]
            text = f"- extra time a snapshot under a tenth of {way}'s: {ratio:.2f}"
            lines.append(f"{text}, {'met' if ratio < 0.1 else '**missed**'}")
    return lines


if __name__ == "__main__":
    main()
