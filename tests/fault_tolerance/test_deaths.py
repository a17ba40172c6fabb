"""SIGKILL at exact points of a snapshot's life: the newest protected step, or a newer one, can always be decoded."""

import pytest

from tests.fault_tolerance.dying import POINTS
from tests.fault_tolerance.vaults import VaultCluster, atlas_of, same_bits, shards, wait_until, whole_state

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
    three.add([victim], module=["tests.fault_tolerance.dying", point, "2"])
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
