"""SIGKILL at exact points of a snapshot's life: the newest protected step, or a newer one, can always be decoded."""

import pytest

from fault_tolerance.snapshots.snapshot import Snapshotter
from tests.fault_tolerance.snapshots.dying import POINTS, WORKER_POINTS
from tests.fault_tolerance.snapshots.staging_worker import WorkerProcess
from tests.fault_tolerance.snapshots.vaults import VaultCluster, atlas_of, same_bits, shards, wait_until, whole_state

pytestmark = pytest.mark.slow
OTHERS = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def three():
    with VaultCluster(0) as cluster:
        cluster.add(OTHERS)
        yield cluster


def assert_decodes(cluster, snapshot, states, atlas):
    tensors, _ = cluster.restore(snapshot, atlas)
    assert all(same_bits(t, shards(atlas, rank, states[snapshot.step])) for rank, t in enumerate(tensors))


@pytest.mark.parametrize("victim", ["n0", "n9"], ids=["the coordinator", "another one"])
@pytest.mark.parametrize("point", POINTS)
def test_a_vault_that_dies_at_this_point_takes_nothing_protected_with_it(three, point, victim):
    """Two more ranks a node than vaults need, two parities: after the death any one of the others may go too."""
    if "others were not told" in point and victim != "n0":
        pytest.skip("only the coordinator tells the others")
    atlas = atlas_of("2x2x2", width=48)
    three.add([victim], module=["tests.fault_tolerance.snapshots.dying", point, "2"])
    doomed = three.vaults[victim].process
    generation = 1 + max(vault.client.status()["fence"] for vault in three.vaults.values())
    plan = three.plan(atlas, tolerate=2, generation=max(1, generation), nodes=sorted(three.vaults))
    assert (plan.coordinator == victim) == (victim == "n0")
    three.open(plan)
    states = {step: whole_state(atlas, 10 * generation + step) for step in (1, 2)}
    try:
        three.protect(plan, 1, states[1])
        three.stage(plan, 2, states[2])
        wait_until(lambda: doomed.poll() is not None, 20)
        assert doomed.returncode == -9, "it died at its point, by SIGKILL"
        for gone in (None, *OTHERS):
            snapshot = three.catalogue(without=[gone] if gone else []).newest
            assert snapshot is not None and snapshot.key[0] == plan.generation and snapshot.step in (1, 2)
            assert_decodes(three, snapshot, states, atlas)
    finally:
        three.detach()
        three.vaults.pop(victim).close()


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_a_worker_that_dies_at_this_point_takes_nothing_protected_with_it(three, point):
    """One rank is a process of its own and dies; the others stage step 2 to its end."""
    atlas = atlas_of("1x3x1", width=48)
    generation = 1 + max(vault.client.status()["fence"] for vault in three.vaults.values())
    plan = three.plan(atlas, tolerate=1, generation=max(1, generation))
    three.open(plan, attach=False)
    states = {1: whole_state(atlas, 1), 2: whole_state(atlas, 2)}
    three.snapshotters = [Snapshotter(plan, rank=rank, secret=three.secret) for rank in (1, 2)]
    worker = WorkerProcess(three, plan, [0], dies_at=point)
    try:
        assert worker.hear() == "ready"
        for step in (1, 2):
            worker.tell(step)
            for snapshotter in three.snapshotters:
                snapshotter.begin(step, {}, shards(atlas, snapshotter.rank, states[step]))
            for snapshotter in three.snapshotters:
                snapshotter.gate()
            if step == 1:
                assert [worker.hear() for _ in range(3)] == ["begun", "copied", [""]]
                wait_until(lambda: all(s.protected == 1 for s in three.snapshotters))
        worker.process.join(20)
        assert worker.process.exitcode == -9, "it died at its point, by SIGKILL"
        wait_until(lambda: not any(a["rank"] == 0 for a in three.vaults["n1"].client.status()["attached"]))
        told = "was told" in point
        if told:
            wait_until(lambda: all(s.protected == 2 for s in three.snapshotters))
        for gone in (None, *OTHERS):
            snapshot = three.catalogue(without=[gone] if gone else []).newest
            assert snapshot is not None and snapshot.key == (plan.generation, 2 if told else 1)
            assert_decodes(three, snapshot, states, atlas)
    finally:
        three.detach()
        worker.close()
