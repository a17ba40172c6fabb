"""The run directory holds whole lines and whole files, whatever happens to its writer."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from framework import run_dir
from framework.run_dir import RunDir, new_run_dir, run_dirs


def row(step, **more):
    return {"step": step, "loss": 5.0 / step, "samples": [8 * (step - 1), 8 * step - 1], "layout": "1x1x1"} | more


def test_rows_come_back_and_the_last_row_of_a_step_counts(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 2, 3):
        run.metric(row(step, generation=1 if step == 1 else 2))
    assert [r["step"] for r in run_dir.metric_rows(tmp_path)] == [1, 2, 3, 2, 3]
    assert [(r["step"], r["generation"]) for r in run_dir.metrics(tmp_path)] == [(1, 1), (2, 2), (3, 2)]


def test_rows_after_a_step_that_is_done_again_count_no_more(tmp_path):
    """A run that ended while it caught up was reported with steps of the way that it had left."""
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 4, 2):
        run.metric(row(step))
    assert [r["step"] for r in run_dir.metrics(tmp_path)] == [1, 2]


def test_an_event_is_stamped_and_an_unknown_kind_is_refused(tmp_path):
    run = RunDir(tmp_path)
    run.event("plan", step=0, generation=1, reason="fresh weights", layout="2x2x1")
    (event,) = run_dir.events(tmp_path)
    assert list(event) == ["time", "kind", "step", "generation", "reason", "layout"]
    assert abs(event["time"] - time.time()) < 60
    with pytest.raises(ValueError, match="event: kind must be one of .*plan.* got 'plam'"):
        run.event("plam", step=0, generation=1, reason="")


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    RunDir(tmp_path).metric(row(1, loss=float("nan"), grad_norm=float("inf")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["loss"] is None


def test_a_file_that_is_being_written_is_read_line_by_line_and_each_line_once(tmp_path):
    """One reader failed at a half-written last line, where the next one passed it over for good."""
    file = tmp_path / "metrics.jsonl"
    tail = run_dir.Tail(file)
    assert tail.new() == []
    file.write_bytes(b'{"step": 1}\n{"step": 2, "loss"')
    assert [row["step"] for row in tail.new()] == [1] == [row["step"] for row in run_dir.metric_rows(tmp_path)]
    with file.open("ab") as more:
        more.write(b': 3.5}\n{"st')
    assert tail.new() == [{"step": 2, "loss": 3.5}] and tail.new() == []


def test_a_torn_last_line_is_cut_off_when_a_new_life_opens_the_directory(tmp_path):
    RunDir(tmp_path).metric(row(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in run_dir.metrics(tmp_path)] == [1]
    RunDir(tmp_path).metric(row(2))
    assert [r["step"] for r in run_dir.metrics(tmp_path)] == [1, 2]


def test_a_writer_killed_at_a_random_moment_leaves_whole_lines(tmp_path):
    code = (
        "import sys, itertools; from framework.run_dir import RunDir; r = RunDir(sys.argv[1]); print('up', flush=True)\n"
        "for i in itertools.count(1): r.metric({'step': i, 'pad': 'x' * (i % 5000)}); r.write_summary({'steps': i})"
    )
    for delay_s in (0.01, 0.05, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay_s)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        rows = run_dir.metric_rows(tmp_path)
        assert rows
        assert run_dir.summary(tmp_path) is None or run_dir.summary(tmp_path)["steps"] > 0


def test_the_summary_is_replaced_whole(tmp_path):
    run = RunDir(tmp_path)
    run.write_summary({"status": "failed", "incidents": [{"nodes": ("node1",)}]})
    run.write_summary({"status": "finished"})
    assert run_dir.summary(tmp_path) == {"status": "finished"}
    assert not list(tmp_path.glob(".*"))


def test_the_identity_of_a_run_is_made_once_and_may_be_inherited(tmp_path):
    first = RunDir(tmp_path / "a")
    assert first.run_id == first.run_id == RunDir(tmp_path / "a").run_id
    second = RunDir(tmp_path / "b")
    assert second.run_id != first.run_id
    second.track_as(first.run_id)
    assert (second.tracking_id, second.run_id != first.run_id) == (first.run_id, True)


def test_a_directory_that_holds_a_run_is_not_taken_for_a_new_one(tmp_path):
    RunDir.create(tmp_path, {"seed": 0}).close()
    with pytest.raises(ValueError, match=r"run_dir: must be new, got .*; go on from it with resume="):
        RunDir.create(tmp_path, {})
    assert run_dir.config(tmp_path) == {"seed": 0}
    with pytest.raises(ValueError, match="must be a run directory"):
        run_dir.config(tmp_path / "nothing")


def test_a_place_that_cannot_be_written_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^run_dir: must be a place that can be written, got /proc/a/run \(No such file .*\); name another one$"):
        RunDir.create("/proc/a/run", {})


def test_two_runs_in_one_second_have_two_names_and_the_newest_is_found(tmp_path):
    names = {new_run_dir(tmp_path) for _ in range(50)}
    assert len(names) == 50
    for age, name in enumerate(sorted(names)[:3]):
        RunDir(name).write_config({})
        for file in os.scandir(name):
            if file.is_file():
                os.utime(file, (1000 - age, 1000 - age))
    assert list(map(str, run_dirs(tmp_path))) == sorted(names)[:3]
    assert run_dirs(tmp_path / "none") == []


def test_a_run_whose_controller_cannot_write_its_end_gets_one_all_the_same_and_never_over_another(tmp_path):
    directory = RunDir(tmp_path)
    run_dir.give_up(tmp_path, {"status": "failed", "reason": "the head is gone"})
    assert run_dir.summary(tmp_path) == {"steps": 0, "status": "failed", "reason": "the head is gone"}
    run_dir.give_up(tmp_path, {"status": "failed", "reason": "again"})
    assert run_dir.summary(tmp_path)["reason"] == "the head is gone"
    directory.close()
