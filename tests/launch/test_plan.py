"""`holdfast plan` says what would be read and done, and refuses what a start would refuse."""

from __future__ import annotations

import contextlib

import pytest

import launch.train
from launch.main import main


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The lines of a plan by key, the last one of each."""
    assert main(["plan", "model=tiny", *words]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_what_there_is_to_read_is_looked_up(capsys, tmp_path, monkeypatch):
    """A path without a file was planned with, and refused only after a cluster had been started for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("b" * 100_000)
    assert planned(capsys, "data=text", "data.path=a.txt")["data"] == "text, 1 file, 0.1 MB, 256 tokens a sample"
    assert main(["plan", "model=tiny", "data=jsonl", "data.path=nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("data.path: no such file or folder, got 'nowhere.jsonl'; ")
    away = ("data=jsonl", "data.path=nowhere.jsonl", "cluster=attached", "cluster.num_nodes=4")
    assert planned(capsys, *away)["data"].startswith("jsonl, "), "the nodes of a cluster may have what this machine has not"


def test_a_run_without_data_is_refused_before_a_cluster_is_started_for_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.train, "_begun", lambda words: contextlib.nullcontext())
    monkeypatch.setattr("framework.cluster.Cluster.open", None)
    assert main(["train", "model=tiny", "data=text", "data.path=nowhere/"]) == 2
    assert capsys.readouterr().err.startswith("data.path: no such file or folder, got 'nowhere/'; ")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_microbatches_that_are_not_those_of_the_config_are_explained(capsys):
    """Three became four in silence, as a pipeline of two wants them in pairs."""
    synthetic = "data=synthetic"
    assert "1f1b, 4 microbatches, FSDP2" in planned(capsys, synthetic)["layout"]
    words = planned(capsys, synthetic, "layout.num_microbatches=3")["layout"]
    assert "4 microbatches (layout.num_microbatches=3, in multiples of pp)" in words
