"""holdfast drill, for real: a node is killed in the middle of a backward pass, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.cluster
def test_a_killed_node_costs_no_sample_and_no_loss(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launch.main", "drill", "node", "optim.num_steps=10"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    logs = "\n".join(path.read_text() for path in tmp_path.glob("runs/drill-*/*.log"))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{logs}"
    summary = json.loads(next(tmp_path.glob("runs/drill-*/node/summary.json")).read_text())
    [incident] = summary["incidents"]
    assert (summary["status"], summary["steps"], summary["samples"]) == ("finished", 10, 80)
    assert (incident["kind"], incident["nodes"], incident["layout_before"]) == ("node_loss", ["n1"], "2x2x2")
    assert incident["layout_after"] != "2x2x2" and incident["steps_lost"] <= 2
