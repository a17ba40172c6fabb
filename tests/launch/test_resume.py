"""Durable checkpoints of real runs: saved on demand, by the interval and on SIGTERM, and gone on from to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fault_tolerance.checkpoints import shelf
from framework import run_dir
from tests.launch.runs import ROOT, Run, rows

PIPELINE = ("layout.pp=2", "layout.dp=1", "cluster.num_nodes=2", "monitor.wandb=offline")


def _numbers(place: Path, steps: range) -> list[tuple[Any, ...]]:
    by_step = {row["step"]: row for row in rows(place)}
    return [tuple(by_step[step][key] for key in ("loss", "grad_norm", "lr", "samples", "tokens")) for step in steps]


@pytest.mark.cluster
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    stopped = Run(tmp_path / "stopped", *PIPELINE, "optim.num_steps=5000", "fault_tolerance.durable.every_steps=10")
    stopped.until(3)
    command = [sys.executable, "-m", "launch.main", "checkpoint", "save", str(stopped.place), "--wait", "60"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    demanded = max(shelf.checkpoints(str(stopped.place / "checkpoints")))
    stopped.until_saved(demanded + 1)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait(130)
    summary = json.loads((stopped.place / "summary.json").read_text())
    step = summary["steps"]
    saved = shelf.checkpoints(str(stopped.place / "checkpoints"))
    assert max(saved) == step, "the state at the signal is kept"
    assert len(saved) == 2, "keep_last"
    reasons = [e["step"] for e in run_dir.events(stopped.place) if e["kind"] == "checkpoint" and e["saved"]]
    assert len(reasons) >= 3 and {demanded, step} <= set(reasons), "on demand, by the interval, and at the signal"
    assert all("checkpoint_age_s" in row for row in rows(stopped.place))

    last = step + 3
    resumed = Run(tmp_path / "resumed", *PIPELINE, "resume=auto", f"optim.num_steps={last}").wait(0)
    through = Run(tmp_path / "through", *PIPELINE, f"optim.num_steps={last}").wait(0)
    assert _numbers(resumed.place, range(step + 1, last + 1)) == _numbers(through.place, range(step + 1, last + 1))
    ends = [json.loads((run.place / "summary.json").read_text()) for run in (resumed, through)]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"] and ends[0]["samples"] == 4 * last
    assert run_dir.RunDir(resumed.place).tracking_id == run_dir.RunDir(stopped.place).run_id
    assert list((resumed.place / "wandb").glob(f"offline-run-*-{run_dir.RunDir(stopped.place).run_id}"))


@pytest.mark.cluster
def test_steps_that_nobody_is_left_to_tell_of_are_in_the_ledger(tmp_path: Path) -> None:
    """A run's only rank was killed a while after it had last been asked. It went on from its newest snapshot, and the steps from the
    last answer to that snapshot were in no row.
    """
    fault = "drill.faults=[{step: 30, kind: kill_worker, rank: 0, phase: backward}]"
    protected = ("fault_tolerance.every_steps=1", "fault_tolerance.max_steps_lost=1", "optim.num_steps=40")
    alone = Run(tmp_path / "alone", "layout.pp=1", "layout.dp=1", "cluster.num_nodes=1", *protected, fault).wait(0)
    assert [row["step"] for row in rows(alone.place)] == list(range(1, 41))
    [incident] = json.loads((alone.place / "summary.json").read_text())["incidents"]
    assert incident["kind"] == "crash" and incident["steps_lost"] <= 1
