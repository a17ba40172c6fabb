"""Watching a run never slows or stops it: sinks that are slow, dead or broken, for real."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from framework.monitor.progress import PlainProgress, duration, make_progress, short
from framework.monitor.prometheus import endpoint
from framework.monitor.sinks import CsvSink, GaugeSink, TensorBoardSink
from framework.monitor.telemetry import Telemetry, named
from framework.monitor.wandb_sink import WandbSink

ROW = {"loss": 2.5, "grad_norm": 0.7, "lr": 1e-3, "tokens": 4096, "samples": [0, 7], "step_time_s": 0.2}
ROW |= {"tokens_per_s": 12345.6, "generation": 1, "layout": "2x2x1", "tolerance": 1, "mfu": 0.31}


SLOW_S = 240  # what starting and ending W&B may take on a machine that does much else


def row(step, **more):
    return {"step": step} | ROW | more


class Collecting:
    """A sink that keeps what it gets; `act` may block or raise."""

    def __init__(self, act=lambda entry: None):
        self.got, self.act, self.opened = [], act, 0

    def open(self):
        self.opened += 1

    def write(self, entry):
        self.act(entry)
        self.got.append(entry)

    def close(self):
        self.got.append("closed")

    def abandon(self):
        self.got.append("abandoned")


def test_numbers_get_their_full_names_and_text_and_nan_are_left_out():
    values = named(row(1, loss=float("nan")) | {"sys/node0/cpu": 0.5, "mem/worker_bytes": 10})
    assert values["train/grad_norm"] == 0.7 and values["perf/mfu"] == 0.31
    assert values["sys/node0/cpu"] == 0.5 and values["mem/worker_bytes"] == 10.0
    assert not {"train/loss", "layout", "samples", "train/samples"} & set(values)


def test_every_entry_arrives_in_order_and_close_waits_for_it():
    sink = Collecting(lambda entry: time.sleep(0.001))
    telemetry = Telemetry({"a": sink})
    for step in range(1, 101):
        telemetry.step(row(step))
    telemetry.event({"kind": "finished", "step": 100})
    telemetry.close()
    assert [entry.step for entry in sink.got[:100]] == list(range(1, 101))
    assert sink.got[-1] == "closed" and telemetry.dropped == {}


def test_a_sink_that_blocks_costs_the_caller_nothing_and_what_is_lost_is_counted():
    gate = threading.Event()
    stuck, healthy = Collecting(lambda entry: gate.wait()), Collecting()
    telemetry = Telemetry({"stuck": stuck, "healthy": healthy}, queue_size=10)
    slowest = 0.0
    for step in range(1, 201):
        began = time.perf_counter()
        telemetry.step(row(step))
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.001)  # so that the healthy sink has its turn
    began = time.perf_counter()
    telemetry.close(timeout_s=0.5)
    assert time.perf_counter() - began < 5
    assert telemetry.dropped["stuck"] >= 180 and "abandoned" in stuck.got
    assert "healthy" not in telemetry.dropped and healthy.got[-1] == "closed" and len(healthy.got) == 201
    assert slowest < 0.5
    gate.set()


def test_a_sink_that_raises_is_opened_again_a_few_times_and_then_given_up(caplog):
    def fail(entry):
        raise ConnectionResetError("gone")

    broken = Collecting(fail)
    telemetry = Telemetry({"broken": broken})
    for step in range(1, 51):
        telemetry.step(row(step))
    telemetry.close()
    assert 2 <= broken.opened <= 5
    assert telemetry.dropped == {"broken": 50}
    assert "given up" in caplog.text and len(caplog.records) <= 2


def test_a_sink_that_recovers_goes_on():
    failures = iter([True, True])

    def sometimes(entry):
        if next(failures, False):
            raise OSError("once more")

    sink = Collecting(sometimes)
    telemetry = Telemetry({"flaky": sink})
    for step in range(1, 11):
        telemetry.step(row(step))
    telemetry.close()
    assert telemetry.dropped == {"flaky": 2} and len(sink.got) == 9


def test_csv_has_one_line_for_each_row_and_goes_on_in_a_second_life(tmp_path):
    for first in (1, 3):
        telemetry = Telemetry({"csv": CsvSink(tmp_path / "metrics.csv")})
        telemetry.step(row(first))
        telemetry.step(row(first + 1))
        telemetry.close()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["1", "2", "3", "4"]
    assert rows[0]["loss"] == "2.5" and rows[0]["layout"] == "2x2x1"


def test_prometheus_gauges_are_set_under_names_it_allows():
    gauges = {}
    telemetry = Telemetry({"prometheus": GaugeSink(lambda: gauges.__setitem__)})
    telemetry.step(row(7), {"sys/node-1/cpu": 0.5})
    for _ in range(2):
        telemetry.event({"kind": "trouble", "step": 7, "reason": "x"})
    telemetry.close()
    assert gauges["holdfast_step"] == 7 and gauges["holdfast_train_loss"] == 2.5
    assert gauges["holdfast_sys_node_1_cpu"] == 0.5 and gauges["holdfast_events_trouble"] == 2


@pytest.mark.slow
def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry({"tensorboard": TensorBoardSink(tmp_path)})
    for step in (1, 2, 3):
        telemetry.step(row(step, loss=3.0 - step))
    telemetry.event({"kind": "trouble", "step": 3, "reason": "rank 1 died"})
    telemetry.close(timeout_s=SLOW_S)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.0)]


def test_plain_progress_says_decisions_and_a_line_now_and_then(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        telemetry = Telemetry({"progress": PlainProgress(100, stream, every_s=3600)})
        for step in (1, 2, 3):
            telemetry.step(row(step))
        telemetry.event({"kind": "snapshot", "step": 3, "reason": "not for people"})
        telemetry.event({"kind": "trouble", "step": 3, "reason": "rank 3 on node1: died"})
        telemetry.step(row(100, val_loss=1.5))
        telemetry.close()
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == (
        "step 1/100  loss 2.5000  12.3k tokens/s  mfu 31.0%  eta 20s  layout 2x2x1  generation 1  tolerance 1"
    )
    assert lines[1] == "trouble: rank 3 on node1: died"
    assert lines[2].startswith("step 100/100  loss 2.5000  val 1.5000") and len(lines) == 3


def test_rich_progress_shows_the_run_and_leaves_decisions_above(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        telemetry = Telemetry({"progress": make_progress("rich", num_steps=10, stream=stream)})
        telemetry.step(row(10))
        telemetry.event({"kind": "recovered", "step": 3, "reason": "layout [1x3x1] on 3 nodes"})
        telemetry.close()
    text = (tmp_path / "out").read_text()
    assert "recovered: layout [1x3x1] on 3 nodes" in text and "10/10" in text and "2.5000" in text


def test_a_decision_keeps_its_kind_on_a_terminal():
    """The kind was printed without an end of line, and the live lines were then drawn over it."""
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        telemetry = Telemetry({"progress": make_progress("auto", num_steps=10, stream=terminal)})
        telemetry.event({"kind": "recovered", "step": 3, "reason": "layout [1x3x1]"})
        telemetry.close()
    written = b""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed says so once all of it has been read
        while piece := os.read(reader, 65536):
            written += piece
    os.close(reader)
    assert "recovered: layout [1x3x1]" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def test_progress_is_plain_where_there_is_no_terminal_and_absent_when_off(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        assert isinstance(make_progress("auto", num_steps=1, stream=stream), PlainProgress)
        assert make_progress("off", num_steps=1, stream=stream) is None


def test_numbers_are_shortened_for_people():
    assert [short(v) for v in (0.5, 999, 12345.6, 7.2e9)] == ["0.5", "999", "12.3k", "7.2G"]
    assert [duration(s) for s in (9, 190, 7260)] == ["9s", "3m10s", "2h01m"]


def wandb_sink(directory):
    config = {"model": {"dim": 64}}
    return WandbSink(
        directory=directory, run_id="abcd1234", mode="offline", project="p", name="n", entity=None, config=config
    )


def read_back(directory):
    """The records of every offline run below a directory, by W&B's own reader: first the run, then its history."""
    found = []
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records = [json.loads(text) for text in out.splitlines()]
        found += [{"run_id": r["run"]["run_id"], "config": r["run"]["config"]} for r in records if r["type"] == "run"]
        found += [r["history"]["item"] for r in records if r["type"] == "history"]
    return found


@pytest.mark.slow
def test_wandb_has_every_step_those_that_were_done_again_included(tmp_path):
    telemetry = Telemetry({"wandb": wandb_sink(tmp_path)})
    for step in (1, 2, 3, 4, 2, 3):
        telemetry.step(row(step), {"sys/node0/cpu": 0.5})
    telemetry.event({"time": 1.0, "kind": "trouble", "step": 4, "reason": "rank 1 died", "detect_s": 0.4})
    telemetry.close(timeout_s=SLOW_S)
    assert telemetry.dropped == {}
    rows = read_back(tmp_path)
    assert [r["trainer/step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 2, 3]
    assert all(r["sys/node0/cpu"] == 0.5 and r["perf/mfu"] == 0.31 for r in rows if "train/loss" in r)
    assert [r["event/trouble/detect_s"] for r in rows if "event/trouble" in r] == [0.4]
    assert rows[0]["run_id"] == "abcd1234" and rows[0]["config"]["update"]["model"] == {"dim": 64}


@pytest.mark.slow
def test_wandb_killed_in_the_middle_is_started_again_under_the_same_id(tmp_path):
    """The pipe once looked alive after the child's death, because W&B's own process had inherited its other end."""
    sink = wandb_sink(tmp_path)
    telemetry = Telemetry({"wandb": sink})
    telemetry.step(row(1))
    child = wait_for(lambda: sink._child)
    wait_for(lambda: list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    began = time.perf_counter()
    for step in range(2, 30):
        telemetry.step(row(step))
    assert time.perf_counter() - began < 1
    telemetry.close(timeout_s=SLOW_S)
    rows = read_back(tmp_path)
    assert {r["run_id"] for r in rows if "run_id" in r} == {"abcd1234"}
    assert [r["trainer/step"] for r in rows if "train/loss" in r][-1] == 29


@pytest.mark.slow
def test_wandb_stopped_dead_neither_slows_the_run_nor_outlives_it(tmp_path):
    sink = wandb_sink(tmp_path)
    telemetry = Telemetry({"wandb": sink}, queue_size=50)
    child = wait_for(lambda: sink._child)
    os.kill(child.pid, signal.SIGSTOP)
    began = time.perf_counter()
    for step in range(1, 5001):
        telemetry.step(row(step))
    assert time.perf_counter() - began < 2
    telemetry.close(timeout_s=1)
    assert child.poll() is not None and telemetry.dropped["wandb"] > 0


@pytest.mark.slow
def test_wandb_closes_its_run_when_the_controller_is_killed(tmp_path):
    code = f"""
import time
from framework.monitor.telemetry import Telemetry
from tests.framework.monitor.test_telemetry import row, wandb_sink
from pathlib import Path
telemetry = Telemetry({{"wandb": wandb_sink(Path({str(tmp_path)!r}))}})
for step in range(1, 11): telemetry.step(row(step))
time.sleep(3); print("logged", flush=True); time.sleep(300)
"""
    controller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert controller.stdout is not None
    controller.stdout.readline()
    controller.kill()
    controller.wait()

    def steps():
        return [r["trainer/step"] for r in read_back(tmp_path) if "train/loss" in r]

    assert wait_for(lambda: steps() == list(range(1, 11)), seconds=SLOW_S)


def wait_for(question, seconds=SLOW_S):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.1)
    pytest.fail("waited in vain")


def test_prometheus_scrapes_a_local_run_at_the_address_that_it_leaves(tmp_path):
    """The gauges of a local run were once set where no agent exported them."""
    telemetry = Telemetry({"prometheus": GaugeSink(lambda: endpoint(tmp_path, "127.0.0.1"))})
    telemetry.step(row(7), {"sys/n0/load": 0.5})
    telemetry.close()
    with urllib.request.urlopen((tmp_path / "prometheus_url").read_text().strip(), timeout=10) as page:
        text = page.read().decode()
    assert "holdfast_step 7.0" in text and "holdfast_sys_n0_load 0.5" in text


def test_rows_are_handed_on_together_and_none_is_lost_at_the_end():
    """A sink that was woken for every step cost more than what it did with it."""
    times = []
    sink = Collecting(lambda entry: times.append(time.monotonic()))
    telemetry = Telemetry({"a": sink}, together_s=0.2)
    for step in range(1, 41):
        telemetry.step(row(step))
        time.sleep(0.01)
    began = time.monotonic()
    telemetry.close()
    assert time.monotonic() - began < 5
    assert [entry.step for entry in sink.got[:-1]] == list(range(1, 41)) and telemetry.dropped == {}
    pauses = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert sum(pause > 0.1 for pause in pauses) < 8
