"""A run on a cluster that somebody else has started: it survives the loss of a node, and leaves the cluster as it was."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ray_cluster import RayCluster
from tests.framework.attached import HOLDFAST, NOTHING, finish, left_behind, train, wait_for_step

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
VICTIM = 2


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    """Three nodes with a token, each on an address of its own."""
    with RayCluster(addresses=["127.0.0.3", "127.0.0.4", "127.0.0.5"]) as cluster:
        yield cluster


def plan(ray: RayCluster, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [HOLDFAST, "plan", "data=synthetic", f"cluster.address={ray.address}", "cluster.num_nodes=3", "cluster.workers_per_node=1", *words]
    return subprocess.run(ray.command(0, argv), env=ray.env, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_asks_the_nodes_of_a_cluster_what_they_have_free_and_refuses_what_does_not_fit(ray: RayCluster) -> None:
    """It said that they would be asked when the run starts, and 24 nodes were reserved before anybody knew."""
    tiny = plan(ray, "model=tiny", "layout.pp=1", "layout.dp=3")
    assert tiny.returncode == 0, tiny.stderr
    for node in ray.addresses:
        assert f"{node}: free machine " in tiny.stdout and f"node {node} " in tiny.stdout
    huge = plan(ray, "model=70b", "layout.pp=1", "layout.dp=3")
    assert huge.returncode == 2 and huge.stderr.startswith("budget: snapshots must fit into the nodes' memory, got ")
    assert ray.addresses[0] in huge.stderr and " GiB is free" in huge.stderr and huge.stderr.count("\n") == 1
    assert left_behind(ray) == NOTHING


def test_a_node_of_somebody_s_cluster_dies_and_the_run_finishes_and_leaves_nothing(ray: RayCluster, tmp_path: Path) -> None:
    """The controller was placed anywhere, here on the node that died, and its history lay on that machine's disk."""
    process = train(ray, tmp_path / "run", num_nodes=3, steps=24)
    wait_for_step(process, tmp_path / "run", lambda row: row["step"] >= 8, 120)
    ray.crash(VICTIM)
    took = wait_for_step(process, tmp_path / "run", lambda row: row["generation"] > 1, 60)
    summary = finish(process, tmp_path / "run", 90)
    (incident,) = summary["incidents"]
    assert (incident["kind"], incident["nodes"], incident["tier"]) == ("node_loss", ["127.0.0.5"], "parity")
    assert incident["steps_lost"] <= 1 and summary["layout"] == "1x2x1" and took < 60
    assert left_behind(ray) == NOTHING
    run_id = (tmp_path / "run" / "run_id").read_text().strip()
    assert not [path for path in Path("/dev/shm").rglob("*") if run_id in path.name]


def test_a_run_whose_terminal_is_gone_ends_by_itself_and_leaves_nothing(ray: RayCluster, tmp_path: Path) -> None:
    """A driver killed by SIGKILL left detached actors and reservations in the cluster for ever."""
    process = train(ray, tmp_path / "run", num_nodes=2, steps=100_000)
    wait_for_step(process, tmp_path / "run", lambda row: row["step"] >= 3, 120)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (left := left_behind(ray)) != NOTHING:
        assert time.monotonic() < deadline, left
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "the program that started the run has ended" in events and '"checkpoint"' in events
