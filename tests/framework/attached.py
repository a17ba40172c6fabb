"""Runs on a Ray cluster that somebody else has started, and what they leave behind in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ray_cluster import RayCluster
from framework import run_dir

HOLDFAST = str(Path(sys.executable).parent / "holdfast")
LOOK = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
from ray._private.state import state
from ray.experimental.internal_kv import _internal_kv_list
groups = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
actors = [a["Name"] for a in state.actor_table(None).values() if a["State"] != "DEAD"]
print(json.dumps({"actors": actors, "groups": groups, "keys": [k.decode() for k in _internal_kv_list(b"holdfast")]}))
"""
NOTHING: dict[str, list[str]] = {"actors": [], "groups": [], "keys": []}


def train(ray: RayCluster, run: Path, *overrides: str, num_nodes: int, steps: int, node: int = 0) -> subprocess.Popen[bytes]:
    """A run, from the command line of one of the cluster's nodes: data parallel, one worker a node, a snapshot a step."""
    words = [
        HOLDFAST, "train", "model=tiny", "data=synthetic", f"optim.num_steps={steps}", "optim.global_batch=12", "monitor=quiet",
        f"cluster.address={ray.address}", f"cluster.num_nodes={num_nodes}", "cluster.min_nodes=1", "layout.pp=1", "layout.tp=1",
        f"layout.dp={num_nodes}", "fault_tolerance.every_steps=1", f"run_dir={run}", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(ray.command(node, words), env=ray.env, cwd=run.parent, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, holds: Callable[[dict[str, Any]], bool], timeout_s: float) -> float:
    """Wait until a row of the run's metrics is as wished. Returns the seconds that it took."""
    began = time.monotonic()
    while not any(holds(row) for row in _rows(run)):
        if process.poll() is not None or time.monotonic() - began > timeout_s:
            raise AssertionError(f"no such step after {timeout_s} s, process {process.poll()}; {_rows(run)[-1:]}")
        time.sleep(0.05)
    return time.monotonic() - began


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the command itself, which on a host of its own has a parent in between."""
    root = psutil.Process(process.pid)
    (root.children() or [root])[0].terminate() if root.name() == "nsenter" else root.terminate()


def finish(
    process: subprocess.Popen[bytes], run: Path, timeout_s: float, *, status: str = "finished", code: int = 0
) -> dict[str, Any]:
    """The summary of a run that must end as is said, with every sample used exactly once."""
    _, said = process.communicate(timeout=timeout_s)
    assert process.returncode == code, said.decode()[-3000:]
    summary = run_dir.summary(run)
    assert summary is not None and summary["status"] == status
    following = 0
    for row in run_dir.metrics(run):
        assert row["samples"][0] == following, row
        following = row["samples"][1] + 1
    assert following == summary["samples"]
    return dict(summary)


def left_behind(ray: RayCluster) -> dict[str, list[str]]:
    """The actors, reservations and keys that are in the cluster."""
    done = subprocess.run(
        ray.command(0, [sys.executable, "-c", LOOK, ray.address]), env=ray.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []  # not there yet, or a line half written
