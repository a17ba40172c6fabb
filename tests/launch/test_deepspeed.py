"""`layout.engine=deepspeed` from the command line: a node is lost, then the run goes on with the other engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework import run_dir
from tests.launch.runs import Run, rows

ZERO = ("layout.engine=deepspeed", "layout.zero_stage=3", "layout.pp=1", "layout.dp=3", "cluster.num_nodes=3")
KEEPING = ("fault_tolerance.every_steps=2", "fault_tolerance.tolerate=1")
PLAIN = ("monitor.wandb=disabled",)


@pytest.mark.cluster
def test_zero_3_survives_a_node_and_goes_on_as_fsdp2_with_the_losses_of_a_run_of_one(tmp_path: Path) -> None:
    """DeepSpeed itself refuses ZeRO's state at another number of ranks."""
    fault = "drill.faults=[{step: 4, kind: kill_node, node: n1, phase: backward}]"
    zero = Run(tmp_path / "zero", *ZERO, *KEEPING, *PLAIN, "optim.num_steps=8", fault).wait(0)
    layouts = [row["layout"] for row in run_dir.metric_rows(zero.place)]  # steps that are done again are there twice
    assert (layouts[0], layouts[-1]) == ("1x3x1", "1x2x1")
    other = ("layout.pp=2", "layout.dp=1", "cluster.num_nodes=2")
    resumed = Run(tmp_path / "resumed", f"resume={zero.place}", *other, *PLAIN, "optim.num_steps=11").wait(0)
    alone = ("layout.pp=1", "layout.dp=1", "cluster.num_nodes=1", "fault_tolerance=off")
    one = Run(tmp_path / "one", *alone, *PLAIN, "optim.num_steps=11").wait(0)
    truth = {row["step"]: row for row in rows(one.place)}
    for row in rows(zero.place) + rows(resumed.place):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(truth[row["step"]][key], rel=1e-5), f"{key} of step {row['step']}"
        assert row["samples"] == truth[row["step"]]["samples"]
    assert max(row["step"] for row in rows(resumed.place)) == 11
    summary = json.loads((zero.place / "summary.json").read_text())
    assert (summary["status"], summary["samples"]) == ("finished", 32)
