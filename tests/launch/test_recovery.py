"""What a loss leaves behind in the processes that live through it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from framework import run_dir
from tests.launch.runs import Run, rows

pytestmark = [pytest.mark.cluster]
FAULT = "drill.faults=[{step: 6, kind: kill_node, node: n2, phase: forward}]"
GROUPS = 4  # of a mesh: all ranks, and one an axis


def loops(process: psutil.Process) -> dict[int, int]:
    """By process below this one that has any: how many of gloo's threads that wait for connections, one a group."""
    found: dict[int, int] = {}
    for child in process.children(recursive=True):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            names = [path.read_text() for path in Path(f"/proc/{child.pid}/task").glob("*/comm")]
            found[child.pid] = sum(name.startswith("gloo_tcp_loop") for name in names)
    return {pid: count for pid, count in found.items() if count}


def test_no_group_of_a_generation_lives_on_in_the_next(tmp_path: Path) -> None:
    """The frames of the error that ended a generation held one of its groups, and gloo's thread of that group, with a message
    that nobody would take any more, woke for ever: two processes at full speed for the rest of the run, and steps that
    took four to seven times as long on two cores.
    """
    run = Run(
        tmp_path / "run", "layout.pp=1", "layout.dp=3", "layout.tp=2", "cluster.num_nodes=3", "cluster.workers_per_node=2",
        "optim.global_batch=12", "optim.num_steps=100000", "fault_tolerance.every_steps=1", FAULT,
    )  # fmt: skip
    run.until_true(lambda: any(row["generation"] == 2 and row["step"] >= 12 for row in rows(run.place)))
    found = loops(psutil.Process(run.process.pid))
    run.process.terminate()
    run.wait(130)
    assert [event["kind"] for event in run_dir.events(run.place)].count("resized") == 1
    assert sorted(found.values()) == [GROUPS] * 4
