"""Runs on hosts with networks of their own: one is cut off without a word, a way between two loses all that goes one way."""

import time
from pathlib import Path

import pytest

from benchmarks.hosts import Boxes, why_not
from benchmarks.ray_cluster import RayCluster
from fault_tolerance.checkpoints import shelf
from framework import run_dir
from tests.framework.attached import NOTHING, finish, interrupt, left_behind, train, wait_for_step

NO_HOSTS = why_not()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_a_host_that_is_cut_off_is_done_without_and_taken_back_and_so_is_one_behind_a_dead_way(tmp_path: Path) -> None:
    """Nothing closes a connection to a host that is cut off, and Ray believes in it for a minute. Of a way that loses what goes one way
    the records named a group of ranks.
    """
    run = tmp_path / "run"
    with Boxes(3) as boxes, RayCluster(boxes=boxes) as ray:
        process = train(ray, run, "fault_tolerance.max_steps_lost=1", "detect.hang_timeout_s=6", num_nodes=3, steps=100_000)
        wait_for_step(process, run, lambda row: row["step"] >= 8, 120)
        boxes.cut(2)
        assert wait_for_step(process, run, lambda row: row["generation"] > 1, 30) < 30
        time.sleep(2)
        boxes.join(2)
        wait_for_step(process, run, lambda row: row["generation"] > 2 and row["layout"] == "1x3x1", 90)
        grown = run_dir.metrics(run)[-1]["generation"]
        time.sleep(2)
        boxes.drop_way(1, 2)
        wait_for_step(process, run, lambda row: row["generation"] > grown and row["layout"] == "1x2x1", 90)
        interrupt(process)
        summary = finish(process, run, 60, status="interrupted", code=130)
        assert left_behind(ray) == NOTHING
    first = summary["incidents"][0]
    assert (first["kind"], first["nodes"]) == ("node_loss", ["10.77.0.3"])
    assert first["steps_lost"] <= 1, "a snapshot of every step, and nobody goes further than one step from it"
    layouts = list(dict.fromkeys((row["generation"], row["layout"]) for row in run_dir.metrics(run)))
    assert [layout for _, layout in layouts] == ["1x3x1", "1x2x1", "1x3x1", "1x2x1"], layouts
    [way] = [e for e in run_dir.events(run) if e["kind"] == "verdict" and e["cause"] == "link_hang"]
    assert way["reason"].startswith("way 10.77.0.2>10.77.0.3: ") and "it does not end" in way["reason"], way
    assert [i["ways"] for i in summary["incidents"] if i["kind"] == "hang"] == [[["10.77.0.2", "10.77.0.3"]]]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_a_way_that_is_dead_when_the_crew_connects_is_named_and_done_without(tmp_path: Path) -> None:
    """Every new crew waited to connect over the dead way until it was back, for five minutes at most, and then the next one."""
    run = tmp_path / "run"
    with Boxes(3) as boxes, RayCluster(boxes=boxes) as ray:
        boxes.drop_way(2, 1)
        process = train(ray, run, num_nodes=3, steps=100_000)
        wait_for_step(process, run, lambda row: row["layout"] == "1x2x1" and row["step"] >= 3, 240)
        interrupt(process)
        summary = finish(process, run, 60, status="interrupted", code=130)
    first = summary["incidents"][0]
    assert (first["kind"], first["ways"]) == ("hang", [["10.77.0.3", "10.77.0.2"]])
    assert first["evidence"].startswith("way 10.77.0.3>10.77.0.2: ") and "has taken no step" in first["evidence"]
    assert [e["node"] for e in run_dir.events(run) if e.get("cause") == "left_out"] == ["10.77.0.3"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_the_machine_of_the_command_is_lost_and_then_ray_s_head(tmp_path: Path) -> None:
    """With the command's machine went the controller, which was bound to it: workers, vaults and reservations stayed in the
    cluster for ever. With the head, Ray ended the command after a minute, with code 1 and without a word; all that came after the
    newest checkpoint was lost, although workers and vaults had lived until then.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    with Boxes(3) as boxes, RayCluster(boxes=boxes, head_cpus=0) as ray:
        process = train(ray, first, num_nodes=2, steps=100_000, node=1)
        wait_for_step(process, first, lambda row: row["step"] >= 8, 150)
        ray.crash(1)
        process.wait(30)
        deadline = time.monotonic() + 180
        while run_dir.summary(first) is None or left_behind(ray) != NOTHING:
            assert time.monotonic() < deadline, left_behind(ray)
            time.sleep(2)
        summary = run_dir.summary(first)
        assert summary is not None and summary["status"] == "interrupted" and [i["kind"] for i in summary["incidents"]][0] == "controller"

        process = train(ray, second, "resume=auto", num_nodes=1, steps=100_000, node=2)
        wait_for_step(process, second, lambda row: row["step"] >= summary["steps"] + 3, 150)
        assert run_dir.metrics(second)[0]["step"] == summary["steps"] + 1
        reached = run_dir.metrics(second)[-1]["step"]
        ray.crash(0)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 3 and b"Ray's head at 10.77.0.1:" in said and b"checkpoint" in said, said.decode()[-2000:]
        ended = run_dir.summary(second)
        assert ended is not None and ended["status"] == "failed" and "Ray's head" in ended["reason"]
    kept, rows = max(shelf.checkpoints(f"{second}/checkpoints")), run_dir.metrics(second)
    assert reached + 20 < kept <= rows[-1]["step"], "of the 45 seconds that it trained on without a head, little is lost"
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], rows[-1]["step"] + 1))
