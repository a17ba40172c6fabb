"""The worker's end: what the copy holds, what the gate waits for, and deaths and stops of workers."""

import time
from pathlib import Path

import psutil
import pytest
import torch

from fault_tolerance.snapshots.pace import Pace
from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.wire import Refused, WireError
from tests.fault_tolerance.snapshots.staging_worker import WorkerProcess
from tests.fault_tolerance.snapshots.vaults import (
    VaultCluster,
    atlas_of,
    said,
    same_bits,
    shards,
    wait_until,
    whole_state,
)

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def cluster():
    with VaultCluster(3) as vaults:
        yield vaults


def next_generation(cluster, atlas, *, attach=True, **options):
    generation = 1 + max(vault.client.status()["fence"] for vault in cluster.vaults.values())
    plan = cluster.plan(atlas, **{"tolerate": 1, **options}, generation=max(1, generation))
    cluster.detach()
    cluster.open(plan, attach=attach)
    return plan


def assert_newest(cluster, plan, key, state):
    snapshot = cluster.catalogue().newest
    assert snapshot.key == key
    tensors, _ = cluster.restore(snapshot, plan.atlas)
    assert all(same_bits(t, shards(plan.atlas, rank, state)) for rank, t in enumerate(tensors))


def test_what_is_overwritten_right_after_the_gate_was_already_copied(cluster):
    """The race that the gate is there for: the trainer writes to its tensors as soon as it may."""
    plan = next_generation(cluster, atlas_of("1x3x1", width=96))
    live = [shards(plan.atlas, rank, whole_state(plan.atlas, 0)) for rank in range(3)]
    for step in range(1, 20):
        state = whole_state(plan.atlas, step)
        for rank, tensors in enumerate(live):
            for name, value in shards(plan.atlas, rank, state).items():
                tensors[name].copy_(value)
        wait_until(lambda: all(s.ready() for s in cluster.snapshotters))
        for snapshotter, tensors in zip(cluster.snapshotters, live, strict=True):
            snapshotter.begin(step, {"step": step}, tensors)
        for snapshotter, tensors in zip(cluster.snapshotters, live, strict=True):
            snapshotter.gate()
            for tensor in tensors.values():
                tensor.fill_(-1.0)
        if step % 9 == 0:
            wait_until(lambda step=step: all(s.protected == step for s in cluster.snapshotters))
            assert_newest(cluster, plan, (plan.generation, step), state)


def test_tensors_in_any_strides_are_staged_as_what_they_hold(cluster):
    """Contiguous ones, which all of ours are, go as ranges of memory; others row by row."""
    plan = next_generation(cluster, atlas_of("1x3x1", width=96))
    state = whole_state(plan.atlas, 3)
    for snapshotter in cluster.snapshotters:
        tensors = shards(plan.atlas, snapshotter.rank, state)
        turned = {piece: t.mT.contiguous().mT if t.dim() > 1 else t for piece, t in tensors.items()}
        assert any(not t.is_contiguous() for t in turned.values())
        snapshotter.begin(3, {}, turned)
    for snapshotter in cluster.snapshotters:
        snapshotter.gate()
    wait_until(lambda: all(s.protected == 3 for s in cluster.snapshotters))
    assert_newest(cluster, plan, (plan.generation, 3), state)


def test_the_gate_waits_for_the_copy_and_says_how_long(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1", width=96), attach=False)
    size = plan.slab(0).nbytes
    slow = [Snapshotter(plan, rank=r, secret=cluster.secret, copy_bytes_s=size * 2) for r in range(3)]
    cluster.snapshotters = slow
    state = whole_state(plan.atlas, 1)
    began = time.monotonic()
    for s in slow:
        s.begin(1, {}, shards(plan.atlas, s.rank, state))
    assert time.monotonic() - began < 0.2
    assert not slow[0].ready()
    stalls = [s.gate() for s in slow]
    assert max(stalls) > 0.2
    assert slow[0].gate() == 0.0
    assert slow[0].cost_s() >= slow[0].stall_s > 0
    wait_until(lambda: all(s.protected == 1 for s in slow))
    for s, stall in zip(slow, stalls, strict=True):
        [event] = said(cluster.vaults[f"n{s.rank}"].client, "gated", generation=plan.generation, rank=s.rank)
        assert event["stall_s"] == stall


def test_a_gate_with_nothing_to_wait_for_costs_nothing(cluster):
    next_generation(cluster, atlas_of("1x3x1"))
    began = time.perf_counter()
    for _ in range(1000):
        cluster.snapshotters[0].gate()
        cluster.snapshotters[0].ready()
    assert time.perf_counter() - began < 0.5


def test_wrong_tensors_are_refused_before_anything_is_sent(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1"))
    tensors = shards(plan.atlas, 0, whole_state(plan.atlas, 0))
    name = next(iter(tensors))
    for wrong in ({}, tensors | {name: tensors[name][:-1]}, tensors | {name: tensors[name].double()}):
        with pytest.raises(ValueError, match="must have shape"):
            cluster.snapshotters[0].begin(1, {}, wrong)
    assert cluster.snapshotters[0].ready()


def test_extra_data_comes_back_with_the_snapshot(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1"))
    cluster.protect(plan, 12, whole_state(plan.atlas, 0))
    assert cluster.catalogue().newest.extra == {"step": 12, "samples": 96}


def test_a_seat_is_taken_once_and_only_on_its_node(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1"))
    with pytest.raises(Refused, match="attached already"):
        Snapshotter(plan, rank=0, secret=cluster.secret)
    cluster.snapshotters[0].close()
    cluster.snapshotters[0] = Snapshotter(plan, rank=0, secret=cluster.secret)
    with pytest.raises((Refused, WireError)):
        Snapshotter(plan, rank=0, secret=b"guess")


def test_a_dead_vault_never_stops_the_trainer():
    with VaultCluster(2) as vaults:
        plan = vaults.plan(atlas_of("1x2x1"), tolerate=1)
        vaults.open(plan)
        state = whole_state(plan.atlas, 1)
        vaults.protect(plan, 1, state)
        vaults.vaults["n0"].kill()
        mine = vaults.snapshotters[0]
        mine.begin(2, {}, shards(plan.atlas, 0, state))
        assert mine.gate() < 5
        wait_until(lambda: mine.failure != "")
        assert not mine.ready()
        mine.begin(3, {}, shards(plan.atlas, 0, state))
        mine.gate()


def test_a_stopped_vault_holds_up_one_gate_and_costs_one_snapshot():
    """One snapshot that a vault on a busy machine was too slow for used to end all snapshots of the generation."""
    with VaultCluster(1) as vaults:
        plan = vaults.plan(atlas_of("1x1x1"), tolerate=0)
        vaults.open(plan)
        process = psutil.Process(vaults.vaults["n0"].process.pid)
        process.suspend()
        vaults.snapshotters[0].begin(1, {}, shards(plan.atlas, 0, whole_state(plan.atlas, 1)))
        assert 4 < vaults.snapshotters[0].gate() < 7
        assert "answer" in vaults.snapshotters[0].missed
        process.resume()
        vaults.protect(plan, 2, whole_state(plan.atlas, 2))
        assert vaults.snapshotters[0].failure == ""
        [missed] = said(vaults.vaults["n0"].client, "snapshot", step=1)
        [kept] = said(vaults.vaults["n0"].client, "snapshot", step=2)
        assert (missed["state"], kept["state"]) == ("abandoned", "protected")
        assert "rank 0" in missed["reason"] and "answer" in missed["reason"]


@pytest.mark.parametrize("moment", ["before", "while copying", "copied"])
def test_a_worker_that_is_killed_leaves_the_last_protected_step_or_a_newer_one(cluster, moment):
    plan = next_generation(cluster, atlas_of("1x3x1", width=96), attach=False)
    rate = plan.slab(0).nbytes * 2 if moment == "while copying" else None
    worker = WorkerProcess(cluster, plan, [0, 1, 2], copy_bytes_s=rate)
    assert worker.hear() == "ready"
    pids = {a["pid"] for vault in cluster.vaults.values() for a in vault.client.status()["attached"]}
    assert pids == {worker.process.pid}
    worker.tell(1)
    assert [worker.hear(), worker.hear(), worker.hear()] == ["begun", "copied", [""] * 3]
    wait_until(lambda: all(v.client.status()["protected"] == 1 for v in cluster.vaults.values()))
    if moment != "before":
        worker.tell(2)
        assert worker.hear() == "begun"
    if moment == "copied":
        assert worker.hear() == "copied"
        time.sleep(0.02)
    since = {n: v.client.watch(0)[-1]["number"] for n, v in cluster.vaults.items()}
    began = time.monotonic()
    assert cluster.vaults["n0"].client.kill_pid(worker.process.pid)
    for node, vault in cluster.vaults.items():
        while not any(e["kind"] == "gone" and e["pid"] == worker.process.pid for e in vault.client.watch(since[node])):
            assert time.monotonic() - began < 5
    worker.close()
    wait_until(lambda: not any(v.client.status()["attached"] for v in cluster.vaults.values()))
    found = cluster.catalogue().newest
    assert found.step in ((1, 2) if moment == "copied" else (1,))
    assert_newest(cluster, plan, found.key, whole_state(plan.atlas, found.step))


def test_a_stopped_worker_that_wakes_up_after_the_fence_spoils_nothing(cluster):
    """Stopped in the middle of its copy, it is fenced, and the next generation fills memory of its own."""
    plan = next_generation(cluster, atlas_of("1x3x1", width=96), attach=False)
    worker = WorkerProcess(cluster, plan, [0, 1, 2], copy_bytes_s=plan.slab(0).nbytes * 2)
    assert worker.hear() == "ready"
    worker.tell(1)
    assert worker.hear() == "begun"
    time.sleep(0.1)
    process = psutil.Process(worker.process.pid)
    process.suspend()
    newer = next_generation(cluster, atlas_of("1x3x1", width=96))
    states = [whole_state(newer.atlas, seed) for seed in (5, 6)]
    cluster.protect(newer, 5, states[0])
    process.resume()
    assert worker.hear() == "copied"
    assert all("newer generation" in reason or "over" in reason for reason in worker.hear())
    assert_newest(cluster, newer, (newer.generation, 5), states[0])
    cluster.protect(newer, 6, states[1])
    assert_newest(cluster, newer, (newer.generation, 6), states[1])
    worker.close()


def test_the_memory_of_surviving_workers_is_used_again_by_the_next_generation(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1", width=96))
    for step in (1, 2):
        cluster.protect(plan, step, whole_state(plan.atlas, step))
    before = cluster.vaults["n0"].client.status()["memory_bytes"]
    newer = next_generation(cluster, atlas_of("1x3x1", width=96), base=(plan.generation, 2))
    for step in (3, 4):
        cluster.protect(newer, step, whole_state(newer.atlas, step))
    assert cluster.vaults["n0"].client.status()["memory_bytes"] == before


def test_five_hundred_snapshots_leak_nothing(cluster):
    pair = list(cluster.vaults)[:2]
    plan = next_generation(cluster, atlas_of("1x2x1"), nodes=pair)
    state = whole_state(plan.atlas, 0)
    live = [shards(plan.atlas, rank, state) for rank in range(2)]
    processes = [psutil.Process(cluster.vaults[node].process.pid) for node in pair] + [psutil.Process()]

    def take(first, last):
        for step in range(first, last):
            wait_until(lambda: all(s.ready() for s in cluster.snapshotters))
            for snapshotter, tensors in zip(cluster.snapshotters, live, strict=True):
                snapshotter.begin(step, {"step": step}, tensors)
            for snapshotter in cluster.snapshotters:
                snapshotter.gate()
        wait_until(lambda: all(s.protected == last - 1 for s in cluster.snapshotters))

    take(1, 60)
    before = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]
    take(60, 560)
    time.sleep(0.5)
    after = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]
    for (rss, fds, threads), (rss_after, fds_after, threads_after) in zip(before, after, strict=True):
        assert rss_after - rss < 4 << 20
        assert fds_after <= fds + 2
        assert threads_after <= threads + 3
    assert not [p.name for p in Path("/dev/shm").iterdir() if cluster.run in p.name]


def test_the_copy_does_not_hold_the_interpreter(cluster):
    """Python code of the trainer goes on while 24 MB are copied."""
    plan = next_generation(cluster, atlas_of("1x3x1", width=256))
    live = [shards(plan.atlas, rank, whole_state(plan.atlas, 0)) for rank in range(3)]
    for snapshotter, tensors in zip(cluster.snapshotters, live, strict=True):
        snapshotter.begin(1, {}, tensors)
    gaps, last = [], time.perf_counter()
    while not all(s._job is None or s._job.copied.is_set() for s in cluster.snapshotters):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    for snapshotter in cluster.snapshotters:
        snapshotter.gate()
    assert len(gaps) > 50


def test_pace_keeps_to_its_rate_without_sleeping_more_than_it_must():
    now = [0.0]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(1000.0, now=lambda: now[0], sleep=sleep)
    for _ in range(100):
        pace(50)
    assert now[0] == pytest.approx(5.0, rel=0.05)
    Pace(None, now=lambda: now[0], sleep=sleep)(10**12)
    assert now[0] == pytest.approx(5.0, rel=0.05)
    with pytest.raises(ValueError, match="rate"):
        Pace(0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the copy off a device cannot be tried without")
def test_a_device_is_read_behind_its_work_and_before_the_gate_opens(cluster):
    plan = next_generation(cluster, atlas_of("1x3x1", width=256))
    state = whole_state(plan.atlas, 1)
    for rank, snapshotter in enumerate(cluster.snapshotters):
        host = shards(plan.atlas, rank, state)
        device = {name: torch.empty_like(t, device="cuda") for name, t in host.items()}
        torch.cuda._sleep(50_000_000)
        for name, t in host.items():
            device[name].copy_(t, non_blocking=True)
        snapshotter.begin(1, {}, device)
        snapshotter.gate()
        for t in device.values():
            t.zero_()
    wait_until(lambda: all(s.protected == 1 for s in cluster.snapshotters))
    assert_newest(cluster, plan, (plan.generation, 1), state)


