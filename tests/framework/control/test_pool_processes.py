"""The pool's processes are asked before they are relied upon, and nobody waits for one whose machine is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.cluster.cluster import Cluster, Machines
from framework.control.pool import Pool, PoolError
from tests.framework.composed import composed

SECRET = "00" * 16
START_S = 120.0

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    opened = Cluster.open(run_id="pool", num_nodes=2, workers_per_node=1, start_timeout_s=START_S)
    yield opened
    opened.close()


@pytest.fixture
def pool(cluster: Cluster, tmp_path: Path) -> Iterator[Pool]:
    config = composed("model=tiny", "data=synthetic", "monitor=quiet", run_dir=str(tmp_path))
    common = {"run_id": "pool", "secret": SECRET}
    made = Pool(cluster, logs=str(tmp_path / "logs"), agent=common, worker={"config": config, **common})
    yield made
    made.close()


def test_idle_workers_that_died_or_were_stopped_are_replaced_before_a_crew_is_called(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spare whose process had died was taken for warm: the crew was mustered with it, failed at once, and was planned anew."""
    monkeypatch.setattr("framework.control.pool.ALIVE_S", 5.0)
    seats = ["n0.0", "n1.0"]
    assert set(pool.ensure(seats, timeout_s=START_S)) == {"worker n0.0", "worker n1.0", "agent n0", "agent n1"}
    assert pool.ensure(seats, timeout_s=START_S) == {}
    dead, stopped = pool.workers["n0.0"].pid, pool.workers["n1.0"].pid
    assert dead is not None and stopped is not None
    os.kill(dead, signal.SIGKILL)
    os.kill(stopped, signal.SIGSTOP)
    assert set(pool.ensure(seats, timeout_s=START_S)) == {"worker n0.0", "worker n1.0"}
    assert {pool.workers[s].pid for s in seats}.isdisjoint({dead, stopped})
    assert not Path(f"/proc/{stopped}").exists()  # it held the only place of its node


def test_a_process_that_never_begins_is_started_anew(pool: Pool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes that answered and one that did not, in the whole of two minutes, the run died. Its raylet would have
    started another only after a patience as long as ours.
    """
    monkeypatch.setattr("framework.control.pool.STUCK_S", 3.0)
    pages, stopped = Path(str(cluster.control)).parent / "book" / "n1", list[int]()
    before, over = {page.name for page in pages.glob("[0-9]*")}, threading.Event()

    def strike() -> None:
        while not over.wait(0.001) and not stopped:
            for page in {p.name for p in pages.glob("[0-9]*")} - before:
                os.kill(int(page), signal.SIGSTOP)  # right after its fork
                stopped.append(int(page))
                return

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        took = pool.ensure(["n0.0", "n1.0"], timeout_s=START_S)
    finally:
        over.set()
        thread.join()
    assert [error.nodes for error in pool.unready] == [("n1",)] and "is started anew" in str(pool.unready[0])
    assert stopped and set(took) == {"worker n0.0", "worker n1.0", "agent n0", "agent n1"}
    assert 3.0 < max(took.values()) < START_S / 2
    os.kill(stopped[0], signal.SIGKILL)


def test_nobody_waits_for_a_process_on_a_machine_that_died_meanwhile(pool: Pool, cluster: Cluster) -> None:
    machines = Machines(str(cluster.control))
    threading.Timer(0.05, machines.kill, ["n1"]).start()
    began = time.monotonic()
    with pytest.raises(PoolError, match=r"n1.* (did not start|must be alive)"):
        for _ in range(200):
            pool.ensure(["n0.0", "n1.0"], timeout_s=START_S)
            time.sleep(0.05)
    assert time.monotonic() - began < START_S / 2
    assert "n1.0" not in pool.workers or not pool.is_ready(["n1.0"])
