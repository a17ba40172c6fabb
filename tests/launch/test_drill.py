"""holdfast drill, for real: what is killed comes back, and nothing is lost; arguments that make no sense are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from framework import run_dir
from launch import drill
from tests.launch.runs import typed


def test_the_drills_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--list"], ["--help"]):
        assert drill.main(words) == 0
        said = capsys.readouterr().out
        assert "controller " in said and "holdfast drill random seed=7" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nodes"], "holdfast drill nodes: no such drill; did you mean holdfast drill node"), (["random", "seed=x"], "seed must be a whole number, got 'x'")],
)
def test_a_drill_that_cannot_be_run_is_refused_before_anything_starts(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drill.main(words)


def drilled(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return typed(home, "drill", *words, timeout_s=600)


@pytest.mark.cluster
def test_two_lost_nodes_all_vaults_and_a_controller_lost_in_every_state_cost_no_sample_and_no_loss(tmp_path: Path) -> None:
    """`sooner`: a second node dies before the crew of the first recovery is called. `controller`: killed while it musters,
    watches, clears up after a lost node, and closes out. `vaults`: no snapshot is left, and it was the end of the run although
    every rank was well. `unseen`: a rank that failed closed its groups, which cut nothing short, and others waited half a minute
    for it. All are judged against their twins, by the command itself. On a busy machine the second node may be
    gone before the first plan; then it has no incident of its own.
    """
    small = ["cluster.workers_per_node=1", "layout.tp=1", "optim.num_steps=40"]  # of one length: they share their twin
    result = drilled(tmp_path, "sooner", "controller", "vaults", "unseen", *small)
    logs = "\n".join(path.read_text(errors="replace") for path in tmp_path.glob("runs/drill-*/*.log"))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{logs}"
    sooner, controller, vaults, unseen = (
        json.loads(next(tmp_path.glob(f"runs/drill-*/{name}/summary.json")).read_text())
        for name in ("sooner", "controller", "vaults", "unseen")
    )
    crews = [e["reason"] for e in run_dir.events(next(tmp_path.glob("runs/drill-*/sooner"))) if e["kind"] == "crew"]
    assert len(list(tmp_path.glob("runs/drill-*/*-twin"))) == 1
    assert (sooner["status"], sooner["steps"]) == ("finished", 40) and "on 2 nodes" in crews[-1], crews
    found = [i["kind"] for i in controller["incidents"]].count("controller")
    assert found >= 3, "all but the first, which may come before there is anything to find again"
    assert controller["samples"] == 320
    assert [i["kind"] for i in unseen["incidents"]] == ["controller"] and unseen["incidents"][0]["total_s"] < 20, unseen["incidents"]
    assert vaults["incidents"] and sum(incident["steps_lost"] for incident in vaults["incidents"]) == 0


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_goes_through_losses_one_after_the_other_and_each_is_written_down(tmp_path: Path) -> None:
    result = drilled(tmp_path, "matrix", "layout=1x4x1", "steps=150", "into=cells")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    done = [json.loads(line) for line in (tmp_path / "cells" / "cells.jsonl").read_text().splitlines()]
    assert done and all(row["held"] and row["steps_lost"] <= 2 for row in done), done
    assert done[0]["cell"] == "1x4x1 0 forward" and done[0]["incidents"][0].startswith("node_loss 1x4x1>")
