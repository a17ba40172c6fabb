"""Durable checkpoints of real runs: saved on demand, by the interval and on SIGTERM, and gone on from to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fault_tolerance import shelf
from framework import run_dir

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = [
    "model=tiny", "data=synthetic", "optim.global_batch=4", "optim.schedule_steps=100", "layout.pp=2", "layout.dp=1",
    "cluster.num_nodes=2", "monitor.wandb=offline", "monitor.progress=plain", "monitor.sample_bytes=0",
]  # fmt: skip


class Run:
    """`holdfast train` in a process of its own."""

    def __init__(self, place: Path, *words: str) -> None:
        self.place = place
        self._log = (place.parent / f"{place.name}.log").open("w")
        command = [sys.executable, "-m", "launch.main", "train", *COMMON, f"run_dir={place}", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=place.parent, env=environment, stdout=self._log, stderr=self._log)

    def wait(self, code: int) -> Run:
        """Until it ends, as it should."""
        assert self.process.wait(300) == code, Path(self._log.name).read_text()[-3000:]
        return self

    def until(self, step: int) -> None:
        """Until it has taken a step."""
        deadline = time.monotonic() + 240
        while not any(row["step"] >= step for row in _rows(self.place)):
            assert self.process.poll() is None and time.monotonic() < deadline, Path(self._log.name).read_text()[-3000:]
            time.sleep(0.05)


def _rows(place: Path) -> list[dict[str, Any]]:
    return run_dir.metrics(place) if (place / "metrics.jsonl").exists() else []


def _numbers(place: Path, steps: range) -> list[tuple[Any, ...]]:
    rows = {row["step"]: row for row in _rows(place)}
    return [tuple(rows[step][key] for key in ("loss", "grad_norm", "lr", "samples", "tokens")) for step in steps]


@pytest.mark.cluster
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    stopped = Run(tmp_path / "stopped", "optim.num_steps=100", "fault_tolerance.durable.every_steps=8")
    stopped.until(3)
    command = [sys.executable, "-m", "launch.main", "checkpoint", "save", str(stopped.place), "--wait", "60"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    stopped.until(12)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait(130)
    summary = json.loads((stopped.place / "summary.json").read_text())
    step = summary["steps"]
    saved = shelf.checkpoints(str(stopped.place / "checkpoints"))
    assert max(saved) == step, "the state at the signal is kept"
    assert len(saved) == 2, "keep_last"
    reasons = [e["step"] for e in run_dir.events(stopped.place) if e["kind"] == "checkpoint" and e["saved"]]
    assert len(reasons) >= 3, "on demand, by the interval, and at the signal"
    assert all("checkpoint_age_s" in row for row in _rows(stopped.place))

    last = step + 3
    resumed = Run(tmp_path / "resumed", f"resume={stopped.place}", f"optim.num_steps={last}").wait(0)
    through = Run(tmp_path / "through", f"optim.num_steps={last}").wait(0)
    assert _numbers(resumed.place, range(step + 1, last + 1)) == _numbers(through.place, range(step + 1, last + 1))
    ends = [json.loads((run.place / "summary.json").read_text()) for run in (resumed, through)]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"] and ends[0]["samples"] == 4 * last
    assert run_dir.RunDir(resumed.place).tracking_id == run_dir.RunDir(stopped.place).run_id
    assert list((resumed.place / "wandb").glob(f"offline-run-*-{run_dir.RunDir(stopped.place).run_id}"))
