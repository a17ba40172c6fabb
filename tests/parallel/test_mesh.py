"""The mesh among real processes: severing, going on in the same processes, and being fenced from older generations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed import FileStore

from parallel.layout import Layout
from parallel.mesh import SLICE_S, Mesh
from tests.parallel.compare import Reference, loss_error, state_error
from tests.parallel.harness import Pool, wait_until
from tests.parallel.mesh_ranks import alone_in_the_crowd, cut_only_its_own, survive, train_and_count
from tests.parallel.ranks import Job, train

pytestmark = pytest.mark.slow


@pytest.fixture
def crew() -> Iterator[Pool]:
    """Processes of its own: these tests lose some."""
    pool = Pool(4)
    yield pool
    pool.stop()


def train_until_all_have_stepped(crew: Pool, job: Job, lost: int, after: Job) -> str:
    """Start a run that ends only when severed. Returns the key that severs it."""
    crew.submit(survive, job, (lost,), after, world=job.world)
    keys = [f"steps {crew.generation} {rank}" for rank in range(job.world)]
    wait_until(lambda: crew.store.check(keys), timeout_s=60)
    return f"sever {crew.generation}"


@pytest.mark.parametrize(
    ("layout", "after", "lost"),
    [
        ("2x2x1", "3x1x1", 0),
        ("2x2x1", "3x1x1", 3),
        ("1x2x2", "1x3x1", 0),  # where all seats are alike
        ("2x1x2", "1x3x1", 0),
        ("2x1x2", "1x3x1", 3),
    ],
)
def test_survivors_of_a_kill_are_out_at_once_and_go_on_under_another_layout(
    crew: Pool, one: Reference, layout: str, after: str, lost: int
) -> None:
    next_job = Job(layout=after, num_microbatches=3, samples=6)
    key = train_until_all_have_stepped(crew, Job(layout=layout), lost, next_job)
    crew.kill(lost)
    time.sleep(0.3)
    crew.store.set(key, str(time.time()))
    survivors = [rank for rank in range(4) if rank != lost]
    outcomes = [crew.collect(rank, 60) for rank in survivors]
    assert [error for error, _ in outcomes] == [None] * 3
    assert max(said.out_s for _, said in outcomes) < 5
    ranks = [said.after for _, said in outcomes]
    assert loss_error(one(next_job), ranks) < 1e-5
    assert state_error(one(next_job), ranks) < 1e-4


def test_a_stopped_peer_frees_nobody_until_the_mesh_is_severed(crew: Pool, one: Reference) -> None:
    """SIGSTOP closes no socket, so gloo itself would wait for its timeout."""
    next_job = Job(layout="1x3x1", num_microbatches=1, samples=6)
    key = train_until_all_have_stepped(crew, Job(layout="2x2x1"), 1, next_job)
    os.kill(crew.pid(1), signal.SIGSTOP)
    time.sleep(0.5)
    crew.store.set(key, str(time.time()))
    outcomes = [crew.collect(rank, 60) for rank in (0, 2, 3)]
    assert [error for error, _ in outcomes] == [None] * 3
    assert max(said.out_s for _, said in outcomes) < 5
    assert loss_error(one(next_job), [said.after for _, said in outcomes]) < 1e-5


def test_who_does_not_come_is_waited_for_only_so_long(crew: Pool) -> None:
    began = time.monotonic()
    error = crew.run(alone_in_the_crowd, 1.0, world=1)[0]
    assert "imeout" in error or "imed out" in error
    assert time.monotonic() - began < 30


def test_severing_cuts_the_connections_of_this_mesh_and_no_others(crew: Pool) -> None:
    """Of two ranks with several groups: all of gloo's sockets, neither the store's nor a stranger's."""
    assert crew.run(cut_only_its_own, world=2) == ["", ""]


def test_a_second_mesh_in_the_same_processes_is_not_taken_for_the_first(pool: Pool, one: Reference) -> None:
    """DTensor's caches outlive a mesh and know it by ranks and names: 1x4x2 after 2x2x2 spoke in groups of the first."""
    for layout in ("2x2x2", "1x4x2"):
        job = Job(layout=layout, steps=1)
        assert loss_error(one(job), pool.run(train, job, world=8)) < 1e-5


def test_generations_leave_nothing_open(crew: Pool) -> None:
    """DTensor's caches kept every mesh, and a mesh keeps its groups: 8 descriptors and 6 threads a generation."""
    jobs = [Job(layout=layout, steps=1, seq_len=16) for layout in ("1x2x2", "2x2x1", "2x1x2")]
    for job in jobs:
        crew.run(train_and_count, job, world=4)
    counts = [crew.run(train_and_count, job, world=4) for job in jobs]
    assert counts[0] == counts[1] == counts[2]


def test_a_rank_that_waits_for_one_who_never_comes_gives_up_when_told() -> None:
    """A second node died while the crew of the first recovery was connecting: everybody else waited for its rank at the store,
    where nothing can be severed, until the deadline passed and they were killed, with all that they had loaded and compiled.
    """
    store, over = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False), threading.Event()
    threading.Timer(0.2, over.set).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        Mesh.connect(store, rank=0, layout=Layout(dp=2), generation=1, arrive_s=60.0, given_up=over.is_set)
    assert time.monotonic() - began < 5.0


def test_who_comes_late_is_waited_for_at_a_store_in_a_file_too(tmp_path: Path) -> None:
    """A store in a file says that a wait took too long with an error of no type of its own: ranks that came half a second
    before the last one gave up, where they have a minute.
    """
    late = subprocess.Popen([sys.executable, "-c", ARRIVES_LATE, str(tmp_path / "store"), str(4 * SLICE_S)])
    mesh = Mesh.connect(FileStore(str(tmp_path / "store"), 2), rank=0, layout=Layout(dp=2), generation=0)
    assert mesh.share("here") == ["here", "there"]
    mesh.close()
    assert late.wait(30.0) == 0


ARRIVES_LATE = """
import sys, time
from torch.distributed import FileStore
from parallel.layout import Layout
from parallel.mesh import SLICE_S, Mesh
time.sleep(float(sys.argv[2]))
mesh = Mesh.connect(FileStore(sys.argv[1], 2), rank=1, layout=Layout(dp=2), generation=0)
mesh.share("there")
mesh.close()
"""
