"""A rank that never comes to a collective, in a real run: it is named, its stack is kept, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework import run_dir
from parallel.native import BuildError
from parallel.recorder_build import load
from tests.launch.runs import typed


@pytest.mark.cluster
def test_a_rank_that_hangs_is_named_with_what_it_was_doing(tmp_path: Path) -> None:
    try:
        load()
    except BuildError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    words = (
        "model=tiny", "data=synthetic", "monitor=quiet", "optim.num_steps=12", "optim.global_batch=4", "layout.pp=1", "layout.dp=4",
        "cluster.num_nodes=2", "cluster.workers_per_node=2", "fault_tolerance.every_steps=2", "fault_tolerance.max_steps_lost=2", "detect.hang_timeout_s=8",
        "drill.faults=[{step: 8, kind: hang, rank: 2, severity: 0}]", f"run_dir={run}",
    )  # fmt: skip
    result = typed(tmp_path, "train", *words, timeout_s=300)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    [verdict] = [event for event in run_dir.events(run) if event["kind"] == "verdict"]
    assert (verdict["cause"], verdict["ranks"], verdict["nodes"]) == ("hang", [2], ["n1"])
    assert "_hang" in verdict["stack"], verdict["stack"]
    [incident] = (run_dir.summary(run) or {})["incidents"]
    assert (incident["kind"], incident["ranks"]) == ("hang", [2])
    assert incident["steps_lost"] <= 2
