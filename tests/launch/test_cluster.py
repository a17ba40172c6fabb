"""holdfast cluster, on a run that is going on: a node is told to leave, another is cut off, one comes back; nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = (
    "model=tiny", "data=synthetic", "optim.global_batch=8", "optim.num_steps=400", "monitor=quiet", "cluster.num_nodes=3",
    "layout.pp=1", "layout.dp=3", "fault_tolerance.tolerate=1", "fault_tolerance.every_steps=5",
)  # fmt: skip
pytestmark = pytest.mark.cluster


def holdfast(*words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.main", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def said(run: Path) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(run: Path, what: Callable[[dict[str, Any]], bool], *, process: subprocess.Popen[str], timeout_s: float = 150.0) -> int:
    """Until an event is there. Returns how many events there are then."""
    deadline = time.monotonic() + timeout_s
    while not any(what(event) for event in said(run)):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, [(e["kind"], e["reason"]) for e in said(run) if e["kind"] != "snapshot"][-12:]
        time.sleep(0.1)
    return len(said(run))


def test_a_node_leaves_on_notice_and_a_new_one_joins_and_no_step_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = holdfast("train", *WORDS, f"run_dir={run}")
    try:
        wait_for(run, lambda e: e["kind"] == "snapshot" and e["step"] > 0, process=process)
        assert "n1    up" in holdfast("cluster", str(run)).communicate(timeout=60)[0]
        drained = holdfast("cluster", str(run), "drain", "n1", "120").communicate(timeout=60)[0]
        assert "n1 has notice" in drained, drained
        wait_for(run, lambda e: e["kind"] == "node" and e["cause"] == "left", process=process)
        holdfast("cluster", str(run), "kill", "n1").communicate(timeout=60)
        wait_for(run, lambda e: e["kind"] == "node" and e["cause"] == "gone", process=process)
        assert "n1 is up" in holdfast("cluster", str(run), "add").communicate(timeout=60)[0], "the dead one comes back first"
        wait_for(run, lambda e: e["kind"] == "resized" and e["incident"]["kind"] == "resize", process=process)
        process.terminate()
        assert process.wait(120) == 130
    finally:
        process.kill()
    summary = json.loads((run / "summary.json").read_text())
    incidents = summary["incidents"]
    assert [(i["kind"], i["nodes"], i["steps_lost"]) for i in incidents] == [("preemption", ["n1"], 0), ("resize", ["n1"], 0)]
    assert [i["layout_after"] for i in incidents] == ["1x2x1", "1x3x1"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, summary["steps"] + 1)), "no step was done twice"
    assert not (run / "control" / "cluster.json").exists()
