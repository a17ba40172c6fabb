"""`holdfast plan` says what would be read and done, and refuses what a start would refuse."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

import launch.train
from framework.cluster.ray_rooms import Rooms
from launch.main import main


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The lines of a plan by key, the last one of each."""
    assert main(["plan", "model=tiny", *words]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
def test_what_there_is_to_read_is_looked_up(capsys, tmp_path, monkeypatch):
    """A path without a file was planned with, and refused only after a cluster had been started for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("b" * 100_000)
    assert planned(capsys, "data=text", "data.path=a.txt")["data"] == "text, 1 file, 0.1 MB, 256 tokens a sample"
    assert main(["plan", "model=tiny", "data=jsonl", "data.path=nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("data.path: no such file or folder, got 'nowhere.jsonl'; ")
    monkeypatch.setattr("framework.cluster.ray_rooms.ask", lambda config: Rooms(refusal="nobody is there"))
    away = ("data=jsonl", "data.path=nowhere.jsonl", "cluster=attached", "cluster.num_nodes=4")
    assert planned(capsys, *away)["data"].startswith("jsonl, "), "the nodes of a cluster may have what this machine has not"


def attached(monkeypatch: pytest.MonkeyPatch, **said: Any) -> tuple[str, ...]:
    monkeypatch.setattr("framework.cluster.ray_rooms.ask", lambda config: Rooms(**said))
    return ("data=synthetic", "cluster=attached", "cluster.num_nodes=4", "cluster.workers_per_node=1")


def test_a_cluster_that_was_asked_is_planned_with_under_its_own_names_and_refused_with_its_own_numbers(capsys, monkeypatch):
    """Nodes of a cluster were planned with as n0, n1, ..., and what they have free was not asked before the start."""
    names = [f"10.0.0.{i}" for i in range(1, 5)]
    domains, free = dict.fromkeys(names, "rack") | {names[0]: "other"}, {name: {f"machine {name}": 8 << 30} for name in names}
    words = attached(monkeypatch, domains=domains, free=free, silent={"10.0.0.9": "0 of 1 CPUs free"})
    assert main(["plan", "model=tiny", *words]) == 0
    said = capsys.readouterr().out
    assert "node 10.0.0.4  ranks " in said and "10.0.0.2: free machine 10.0.0.2 8192.0 MiB" in said and "10.0.0.9: 0 of 1 CPUs free" in said
    small = attached(monkeypatch, domains=domains, free=free | {names[2]: {"cgroup 7": 1 << 20}})
    assert main(["plan", "model=tiny", *small]) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("budget: snapshots must fit into the nodes' memory, got 10.0.0.3: ") and "only 1.00 MiB is free (cgroup 7)" in refusal


@pytest.mark.slow
def test_nodes_that_do_not_answer_are_named_and_the_plan_is_printed_all_the_same(capsys, monkeypatch):
    words = attached(monkeypatch, domains={"a": "a", "b": "b"}, free={"a": {"machine 1": 1 << 40}}, silent={"b": "no answer within 20 s"})
    assert main(["plan", "model=tiny", *words]) == 0
    said = capsys.readouterr().out
    assert "b: no answer within 20 s; it is asked when the run starts" in said
    assert "2 of 4 nodes could hold 1 workers now; it is asked when the run starts" in said
    assert main(["plan", "model=tiny", *attached(monkeypatch, refusal="cluster.address: nobody")]) == 0
    assert "free memory is not known: cluster.address: nobody; it is asked when the run starts" in capsys.readouterr().out


def test_a_run_without_data_is_refused_before_a_cluster_is_started_for_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.train, "_begun", lambda words: contextlib.nullcontext())
    monkeypatch.setattr("framework.cluster.cluster.Cluster.open", None)
    assert main(["train", "model=tiny", "data=text", "data.path=nowhere/"]) == 2
    assert capsys.readouterr().err.startswith("data.path: no such file or folder, got 'nowhere/'; ")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
def test_microbatches_that_are_not_those_of_the_config_are_explained(capsys):
    """Three became four in silence, as a pipeline of two wants them in pairs."""
    synthetic = "data=synthetic"
    assert "1f1b, 4 microbatches, FSDP2" in planned(capsys, synthetic)["layout"]
    words = planned(capsys, synthetic, "layout.num_microbatches=3")["layout"]
    assert "4 microbatches (layout.num_microbatches=3, in multiples of pp)" in words
