"""The journal keeps every step that was taken, also those that nobody had told it of when their teller was lost."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework import run_dir
from framework.config import decode
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.monitor.prometheus import Gauge
from framework.plan import Plan, Seat, Source
from parallel.layout import Layout
from tests.framework.composed import composed


def journal(directory: Path) -> Journal:
    values = composed("model=tiny", "data=synthetic", "monitor=quiet", run_dir=str(directory))
    return Journal(decode(values | {"run_dir": str(directory)}), "run", gauge=no_gauge)


def no_gauge() -> Gauge:
    raise AssertionError("monitor=quiet has no Prometheus")


def row(step: int, generation: int) -> dict[str, Any]:
    return {
        "step": step, "loss": 1.0 / step, "samples": [4 * step - 4, 4 * step - 1], "step_time_s": 0.1, "generation": generation,
        "layout": "1x1x1",
    }  # fmt: skip


def test_rows_that_were_not_told_are_taken_over_from_whoever_kept_them(tmp_path: Path) -> None:
    """Two nodes and the controller died together: the next controller found a snapshot of step 6, and rows up to 5 only, so
    the samples of step 6 were missing in the ledger although they had been trained on.
    """
    first = journal(tmp_path)
    first.adopt([row(step, 1) for step in (1, 2, 3, 4)])
    first.close()
    second = journal(tmp_path)
    assert second.reached == 4
    for _ in range(2):  # every rank that lives tells the same
        second.adopt([row(step, 1) for step in (2, 3, 4, 5, 6)])
    assert second.reached == 6
    assert [r["step"] for r in run_dir.metric_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    second.close()


def test_of_a_step_that_was_done_again_the_newer_generation_counts(tmp_path: Path) -> None:
    written = journal(tmp_path)
    written.adopt([row(step, 1) for step in (1, 2, 3, 4)])
    written.adopt([row(3, 2), row(4, 2)])
    written.adopt([row(step, 1) for step in (3, 4, 5)])  # a rank of the old crew that was asked late
    assert written.reached == 4
    assert [(r["step"], r["generation"]) for r in run_dir.metrics(tmp_path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    written.close()


def test_the_loss_of_the_controller_is_an_incident_that_counts_from_its_last_word(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.adopt([row(1, 1)])
    first.close()
    time.sleep(0.3)
    second = journal(tmp_path)
    second.inherited(Trouble("controller", (), (), "lost", 1, time.time(), silent_s=second.silent_s))
    second.close()
    [event] = [e for e in run_dir.events(tmp_path) if "incident" in e]
    assert event["incident"]["kind"] == "controller"
    assert 0.3 <= event["incident"]["detect_s"] < 5.0


def test_a_run_that_resumes_another_one_stands_at_its_checkpoint_before_it_has_trained(tmp_path: Path) -> None:
    """A resumed run whose crew did not get together said that step 1 had failed three times."""
    resumed = journal(tmp_path)
    assert resumed.stands_at == 0
    resumed.plan = plan_of(Source("durable", 100))
    assert (resumed.reached, resumed.stands_at) == (0, 100)
    resumed.adopt([row(101, 1)])
    assert resumed.stands_at == 101
    resumed.close()


def test_a_loss_costs_the_steps_that_were_taken_not_those_that_were_told(tmp_path: Path) -> None:
    """A lone rank was killed in its 30th step, four after those that it had told: it was said that nothing was lost."""
    run = journal(tmp_path)
    run.adopt([row(step, 1) for step in range(1, 26)])
    run.trouble(Trouble("crash", (0,), ("n0",), "killed", 25, time.time()), plan_of(Source("fresh", 0)))
    run.saw(29)
    run.planned(plan_of(Source("memory", 25)), seconds=0.0)
    run.close()
    [event] = [e for e in run_dir.events(tmp_path) if "incident" in e]
    assert event["incident"]["steps_lost"] == 4


def plan_of(source: Source) -> Plan:
    return Plan("run", 1, Layout(), "1f1b", 1, (Seat("n0", 0),), {"n0": "n0"}, 0, source, (), "as configured")


@contextmanager
def full_disk(directory: Path, room: int) -> Iterator[None]:
    """No file of this process may grow beyond the largest of a directory by more than `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in directory.glob("*.jsonl"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    """A run ended with a traceback, without a summary, because a row of metrics.jsonl could not be written."""
    written = journal(tmp_path)
    written.adopt([row(1, 1)])
    with full_disk(tmp_path, room=20):  # a part of a row fits
        written.adopt([row(step, 1) for step in (2, 3, 4)])
        written.event("node", reason="n4 joins")
        values = written.summary("failed", reason="it was enough", closing={}, exit_code=3)
    said = [item["event"]["reason"] for item in written.since(0)["said"] if "event" in item]
    assert values["status"] == "failed"
    assert any(text.startswith(f"run_dir: {tmp_path}/metrics.jsonl: File too large; make room there; training goes on") for text in said)
    assert any("summary.json could not be written" in text for text in said)
    written.adopt([row(5, 1)])
    written.close()
    assert [r["step"] for r in run_dir.metric_rows(tmp_path)] == [1, 2, 3, 4, 5]
    kinds = [(e["kind"], e["reason"]) for e in run_dir.events(tmp_path)]
    assert ("node", "n4 joins") in kinds and kinds[-1] == ("alarm", "run_dir: all rows that had to wait are written")
