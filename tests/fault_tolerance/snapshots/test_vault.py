"""Vaults as processes: what is protected, what is refused, and what every damage and death leaves."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fault_tolerance.coding import placement
from fault_tolerance.snapshots.budget import budget
from fault_tolerance.snapshots.catalogue import catalogue
from fault_tolerance.snapshots.restore import Reader, RestoreError
from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault import Vault
from fault_tolerance.snapshots.vault_client import VaultClient
from fault_tolerance.snapshots.wire import Refused, WireError, connect
from tests.fault_tolerance.snapshots.vaults import (
    VaultCluster,
    atlas_of,
    empty_shards,
    said,
    same_bits,
    shards,
    wait_until,
    whole_state,
)

ONE = "1x1x1"
PATTERNS = [(2, 1), (4, 1), (4, 2), (4, 3), (5, 1), (5, 2), (5, 3), (8, 1), (8, 2), (8, 3)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def eight():
    with VaultCluster(8) as cluster:
        yield cluster


def generation_of(cluster):
    """A number above all that the vaults have seen."""
    return 1 + max(vault.client.status()["fence"] for vault in cluster.vaults.values())


def protected(cluster, *, tolerate, nodes, layout="2x2x2", step=3, seed=0, **options):
    """A fresh generation with one protected step."""
    atlas = atlas_of(layout)
    plan = cluster.plan(atlas, tolerate=tolerate, generation=max(1, generation_of(cluster)), nodes=nodes, **options)
    cluster.open(plan)
    state = whole_state(atlas, seed)
    cluster.protect(plan, step, state)
    return plan, state


def inventories(cluster, plan):
    return {node: cluster.vaults[node].client.inventory() for node in plan.nodes}


def assert_restores(cluster, snapshot, state, layout=ONE, width=24):
    atlas = atlas_of(layout, width=width)
    tensors, stats = cluster.restore(snapshot, atlas)
    assert all(same_bits(t, shards(atlas, rank, state)) for rank, t in enumerate(tensors))
    return stats


@pytest.mark.parametrize(("nodes", "tolerate"), PATTERNS)
def test_every_pattern_of_up_to_m_lost_vaults_gives_the_staged_bytes(eight, nodes, tolerate):
    names = list(eight.vaults)[:nodes]
    plan, state = protected(eight, tolerate=tolerate, nodes=names, seed=nodes * 10 + tolerate)
    everything = inventories(eight, plan)
    for count in range(tolerate + 2):
        for lost in itertools.combinations(names, count):
            found = catalogue([everything[n] for n in names if n not in lost], run=eight.run)
            if count > tolerate:
                assert found.newest is None, "more than the code can mend must be reported as lost, never as data"
                assert found.rejected or nodes == count
                continue
            assert found.newest.spare == tolerate - count
            assert_restores(eight, found.newest, state)


@pytest.mark.parametrize(("nodes", "tolerate"), [(4, 1), (4, 2), (5, 3)])
def test_vaults_that_are_really_killed_leave_the_others_enough(nodes, tolerate):
    with VaultCluster(nodes) as cluster:
        plan, state = protected(cluster, tolerate=tolerate, nodes=None)
        victims = random.Random(nodes).sample(list(plan.nodes), tolerate + 1)
        for count, victim in enumerate(victims, start=1):
            cluster.vaults[victim].kill()
            found = cluster.catalogue()
            if count <= tolerate:
                assert found.newest.missing == tuple(n for n in plan.nodes if n in victims[:count])
                stats = assert_restores(cluster, found.newest, state, "1x2x2")
                assert sum(s.decoded_bytes for s in stats) > 0
            else:
                assert found.newest is None
                assert "blocks it needs" in found.rejected[0].reason


def test_one_flipped_bit_in_any_stored_block_is_found_and_decoded_around(eight):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=2, nodes=names)
    everything = inventories(eight, plan)
    found_bad = 0
    for node in names:
        lost = next(n for n in names if n != node)
        snapshot = catalogue([everything[n] for n in names if n != lost], run=eight.run).newest
        client = eight.vaults[node].client
        for kind, index in [("data", 0), ("data", 1), ("parity", 0), ("parity", 1)]:
            flip = (plan.generation, 3, kind, index)
            offset = plan.real_bytes(node, index) // 2 if kind == "data" else 5
            client.corrupt(*flip, offset=offset)
            stats = assert_restores(eight, snapshot, state)
            found_bad += sum(s.bad_chunks for s in stats)
            assert kind == "parity" or sum(s.bad_chunks for s in stats) > 0
            client.corrupt(*flip, offset=offset)  # flipped back
    assert found_bad >= 8


@pytest.mark.parametrize("damage", ["older step", "other run", "cut off", "swapped"])
def test_a_block_that_is_not_the_right_one_is_an_erased_block(eight, damage):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=1, nodes=names, step=3, seed=1)
    node, client = names[1], eight.vaults[names[1]].client
    length = plan.real_bytes(node, 0)
    older = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    replaced = {
        "older step": older,
        "other run": older[::-1],
        "cut off": bytes(length - length // 3),
        "swapped": client_block(eight, plan, node, 1)[: plan.real_bytes(node, 1)],
    }[damage]
    client.corrupt(plan.generation, 3, "data", 0, offset=length - len(replaced), data=replaced)
    stats = assert_restores(eight, eight.catalogue().newest, state)
    assert sum(s.bad_chunks for s in stats) >= len(replaced) // plan.chunk_bytes
    assert sum(s.decoded_bytes for s in stats) >= len(replaced) // plan.chunk_bytes * plan.chunk_bytes


def client_block(cluster, plan, node, index):
    channel = connect(cluster.vaults[node].address, run=cluster.run, secret=cluster.secret)
    length = plan.real_bytes(node, index)
    request = {"op": "read", "generation": plan.generation, "step": 3, "kind": "data", "index": index}
    _, data = channel.call(request | {"offset": 0, "length": length})
    channel.close()
    return bytes(data)


def test_more_damage_than_the_code_can_mend_is_an_error_and_never_data(eight):
    names = list(eight.vaults)[:4]
    plan, _ = protected(eight, tolerate=1, nodes=names)
    stripe = plan.groups[0].stripes[0]
    for block, node in enumerate(stripe.data[:2]):
        eight.vaults[node].client.corrupt(plan.generation, 3, "data", block, offset=1)
    atlas = atlas_of(ONE)
    reader = Reader(eight.catalogue().newest, node="elsewhere", secret=eight.secret)
    with pytest.raises(RestoreError, match="intact"):
        reader.restore(atlas, 0, empty_shards(atlas, 0))
    reader.close()


@pytest.mark.parametrize(("kind", "index"), [("data", 1), ("parity", 0), ("parity", 1)])
def test_the_scrubber_finds_damage_and_mends_it_from_the_other_blocks(eight, kind, index):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=2, nodes=names, scrub_bytes_s=1e9)
    client = eight.vaults[names[2]].client
    since = client.watch(0)[-1]["number"]
    client.corrupt(plan.generation, 3, kind, index, offset=plan.chunk_bytes + 9)
    [event] = said(client, "bad_chunk", since=since)
    assert (event["block"], event["chunk"], event["repaired"]) == (f"{kind} {index}", 1, True)
    assert client.status()["bad_chunks"] == 0
    stats = assert_restores(eight, eight.catalogue(without=names[:2]).newest, state)
    assert sum(s.bad_chunks for s in stats) == 0


def test_damage_that_the_others_cannot_mend_is_known_to_the_catalogue(eight):
    """The same chunk of two blocks of one stripe, with one parity: no repair, and both count as erased."""
    names = list(eight.vaults)[:4]
    plan, _ = protected(eight, tolerate=1, nodes=names)
    stripe = plan.groups[0].stripes[0]
    for block, node in enumerate(stripe.data[:2]):
        eight.vaults[node].client.corrupt(plan.generation, 3, "data", block, offset=9)
    assert eight.catalogue().newest.key == (plan.generation, 3)
    scrubbed = eight.plan(
        plan.atlas, tolerate=1, generation=plan.generation + 1, nodes=names, base=(plan.generation, 3), scrub_bytes_s=1e9
    )
    eight.open(scrubbed, attach=False)
    for node in stripe.data[:2]:
        [event] = said(eight.vaults[node].client, "bad_chunk", generation=plan.generation)
        assert not event["repaired"]
    found = eight.catalogue()
    assert found.newest is None and "blocks it needs" in found.rejected[0].reason


def test_wire_bytes_stay_within_five_percent_of_the_bound(eight):
    atlas = atlas_of("2x2x2", width=192)
    for nodes, tolerate in [(4, 1), (4, 2), (8, 2), (8, 3)]:
        names = list(eight.vaults)[:nodes]
        plan = eight.plan(atlas, tolerate=tolerate, generation=generation_of(eight), nodes=names, chunk_bytes=1 << 18)
        eight.open(plan)
        state = whole_state(atlas, 0)
        eight.protect(plan, 1, state)
        before = sum(eight.vaults[n].client.status()["wire_sent"] for n in names)
        asking = sum(eight.vaults[n].client.status()["wire_sent"] for n in names) - before
        eight.protect(plan, 2, state)
        sent = sum(eight.vaults[n].client.status()["wire_sent"] for n in names) - before - 2 * asking
        most = max(plan.node_bytes(n) for n in names)
        bound = nodes * most * (nodes - 1) / (nodes - tolerate)
        assert sent <= 1.05 * bound, f"n={nodes} m={tolerate}: {sent / bound:.3f} of the bound"


def kernel_bytes(pid):
    """Pages that the memfds of a vault have, as the kernel counts them."""
    folder = Path(f"/proc/{pid}/fd")
    held = [fd.stat() for fd in folder.iterdir() if "holdfast-" in os.readlink(fd) and "-control" not in os.readlink(fd)]
    return sum({status.st_ino: status.st_blocks * 512 for status in held}.values())


def test_memory_is_what_the_budget_says_by_the_kernels_count():
    atlas = atlas_of("2x2x2", width=96)
    with VaultCluster(5) as cluster:
        plan = cluster.plan(atlas, tolerate=2, generation=1)
        cluster.open(plan)
        for step in (1, 2, 3):
            cluster.protect(plan, step, whole_state(atlas, step))
        needs = budget(plan.groups, {n: plan.node_bytes(n) for n in plan.nodes}, chunk_bytes=plan.chunk_bytes)
        for node, vault in cluster.vaults.items():
            measured = kernel_bytes(vault.process.pid)
            assert abs(measured - needs[node].shared_bytes) <= 0.05 * needs[node].shared_bytes
            assert vault.client.status()["memory_bytes"] == measured


def test_groups_of_unequal_nodes_and_nodes_without_ranks_are_protected(eight):
    names = list(eight.vaults)[:7]
    plan, state = protected(eight, tolerate=1, nodes=names, layout="1x1x3", group_size=4)
    assert len(plan.groups) == 2
    everything = inventories(eight, plan)
    for lost in itertools.combinations(names, 2):
        found = catalogue([everything[n] for n in names if n not in lost], run=eight.run)
        if placement.survives(plan.groups, lost) or found.newest is not None:
            assert_restores(eight, found.newest, state)


def test_without_tolerance_local_copies_are_kept_and_nothing_is_sent(eight):
    names = list(eight.vaults)[:3]
    _, state = protected(eight, tolerate=0, nodes=names, layout="1x3x1")
    assert_restores(eight, eight.catalogue().newest, state)
    assert eight.catalogue(without=names[:1]).newest is None
    assert all(item["parity"] == [] for n in names for item in eight.vaults[n].client.inventory()["versions"])


def test_a_single_node_is_protected_against_its_workers(eight):
    _, state = protected(eight, tolerate=0, nodes=list(eight.vaults)[:1], layout="1x1x1")
    stats = assert_restores(eight, eight.catalogue().newest, state)
    assert stats[0].tier == "peer_memory"


# ---- generations


def test_an_older_generation_is_refused_everything_but_reading(eight):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=1, nodes=names)
    newer = eight.plan(atlas_of("1x2x2"), tolerate=1, generation=plan.generation + 1, nodes=names, base=(plan.generation, 3))
    zombies, eight.snapshotters = eight.snapshotters, []
    eight.open(newer, attach=False)
    assert all(z.fenced and not z.ready() for z in zombies)
    for client in (eight.vaults[n].client for n in names):
        with pytest.raises(Refused, match="must be >="):
            client.open(plan)
    zombies[0].begin(9, {}, shards(plan.atlas, 0, state))
    zombies[0].gate()
    wait_until(lambda: zombies[0].failure)
    assert "over" in zombies[0].failure
    with pytest.raises(Refused, match="over"):
        Snapshotter(plan, rank=0, secret=eight.secret)
    assert_restores(eight, eight.catalogue().newest, state)
    for zombie in zombies:
        zombie.close()


def test_a_generation_has_one_plan(eight):
    names = list(eight.vaults)[:4]
    plan, _ = protected(eight, tolerate=1, nodes=names)
    client = eight.vaults[names[0]].client
    client.open(plan)  # again is fine
    other = eight.plan(plan.atlas, tolerate=2, generation=plan.generation, nodes=names)
    with pytest.raises(Refused, match="another plan"):
        client.open(other)


def test_the_base_is_kept_until_the_new_generation_is_protected(eight):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=1, nodes=names, step=5)
    newer = eight.plan(
        atlas_of("1x2x2"), tolerate=1, generation=plan.generation + 1, nodes=names, base=(plan.generation, 5)
    )
    eight.open(newer)
    after = whole_state(newer.atlas, 77)
    for snapshotter in eight.snapshotters[:-1]:  # one rank never stages
        snapshotter.begin(6, {}, shards(newer.atlas, snapshotter.rank, after))
    for snapshotter in eight.snapshotters[:-1]:
        snapshotter.gate()
    found = eight.catalogue()
    assert found.newest.key == (plan.generation, 5)
    assert_restores(eight, found.newest, state)
    assert found.rejected[0].step == 6
    assert "had not staged" in found.rejected[0].reason
    eight.snapshotters[-1].begin(6, {}, shards(newer.atlas, eight.snapshotters[-1].rank, after))
    wait_until(lambda: all(s.protected == 6 for s in eight.snapshotters))
    assert [s.key for s in eight.catalogue().snapshots] == [(newer.generation, 6)]
    assert_restores(eight, eight.catalogue().newest, after)


def test_a_version_that_takes_too_long_is_given_up_and_the_next_one_goes_on(eight):
    names = list(eight.vaults)[:4]
    plan, state = protected(eight, tolerate=1, nodes=names, deadline_s=1.0)
    absent = eight.snapshotters[-1]
    for snapshotter in eight.snapshotters[:-1]:
        snapshotter.begin(4, {}, shards(plan.atlas, snapshotter.rank, state))
    for snapshotter in eight.snapshotters[:-1]:
        snapshotter.gate()
    assert not absent.ready()
    wait_until(lambda: all(s.ready() for s in eight.snapshotters))
    [event] = said(eight.vaults[names[0]].client, "snapshot", generation=plan.generation, step=4)
    assert event["state"] == "abandoned" and "within 1 s" in event["reason"]
    assert eight.catalogue().newest.key == (plan.generation, 3)
    newer = whole_state(plan.atlas, 5)
    eight.protect(plan, 5, newer)
    assert_restores(eight, eight.catalogue().newest, newer)


def test_a_forgotten_version_is_gone(eight):
    names = list(eight.vaults)[:4]
    plan, _ = protected(eight, tolerate=1, nodes=names)
    for node in names:
        eight.vaults[node].client.forget(plan.generation, 3)
    found = eight.catalogue()
    assert (plan.generation, 3) not in [s.key for s in found.snapshots]


def test_the_rate_limit_holds(eight):
    names = list(eight.vaults)[:4]
    atlas = atlas_of("2x2x2", width=96)
    plan = eight.plan(atlas, tolerate=1, generation=generation_of(eight), nodes=names, max_rate_bytes_s=1e6)
    eight.open(plan)
    began = time.monotonic()
    eight.protect(plan, 1, whole_state(atlas, 1))
    least = min(plan.node_bytes(n) for n in names) / 1e6
    assert time.monotonic() - began > 0.7 * least


def test_strangers_get_nothing(eight):
    address = next(iter(eight.vaults.values())).address
    for run, secret in [(eight.run, b"guess"), ("other", eight.secret)]:
        with pytest.raises((Refused, WireError)):
            VaultClient(address, run=run, secret=secret).status()


def test_only_attached_processes_can_be_killed(eight):
    with pytest.raises(Refused, match="never attached"):
        next(iter(eight.vaults.values())).client.kill_pid(os.getppid())


def test_a_second_vault_of_a_node_is_refused_while_the_first_lives():
    with VaultCluster(1) as cluster:
        with pytest.raises(OSError, match="in use"):
            Vault(node="n0", run=cluster.run, secret=cluster.secret)
        cluster.vaults["n0"].kill()
        Vault(node="n0", run=cluster.run, secret=cluster.secret).close()


def test_a_vault_ends_with_its_owner_and_when_told():
    with VaultCluster(2) as cluster:
        cluster.vaults["n0"].client.shutdown()
        assert cluster.vaults["n0"].process.wait(5) == 0
        cluster.vaults["n1"].process.stdin.close()
        assert cluster.vaults["n1"].process.wait(5) == 0


@pytest.mark.parametrize("tolerate", [1, 2])
def test_whatever_is_killed_whenever_the_newest_protected_step_or_a_newer_one_is_there(tolerate):
    """Vaults die at random moments of a snapshot's life, from before the first byte to after the freeing of the old
    step; then they are replaced and the next generation goes on from what was found."""
    rng = random.Random(tolerate)
    atlas = atlas_of("2x2x2", width=48)
    with VaultCluster(4) as cluster:
        generation, base, step, states = 1, None, 1, {}
        for _ in range(5):
            plan = cluster.plan(atlas, tolerate=tolerate, generation=generation, base=base, max_rate_bytes_s=4e6)
            cluster.open(plan)
            states[step] = whole_state(atlas, step)
            cluster.protect(plan, step, states[step])
            states[step + 1] = whole_state(atlas, step + 1)
            cluster.stage(plan, step + 1, states[step + 1])
            time.sleep(rng.uniform(0, 0.35))
            victims = rng.sample(list(cluster.vaults), rng.randint(1, tolerate))
            for victim in victims:
                cluster.vaults[victim].process.send_signal(signal.SIGKILL)
            for victim in victims:
                cluster.vaults[victim].process.wait()
            snapshot = cluster.catalogue().newest
            assert snapshot is not None
            assert snapshot.step in (step, step + 1)
            assert_restores(cluster, snapshot, states[snapshot.step], width=48)
            cluster.detach()
            cluster.add(victims)
            generation, base, step = generation + 1, snapshot.key, snapshot.step + 1


def test_a_version_can_be_read_in_place_by_its_host_and_is_not_overwritten_meanwhile():
    """The agent writes durable checkpoints straight out of the vault's memory."""
    with VaultCluster(0) as cluster:
        vault = Vault(node="n0", run=cluster.run, secret=cluster.secret)
        vault.start()
        client = VaultClient(vault.address, run=cluster.run, secret=cluster.secret)
        cluster.vaults = {}
        atlas = atlas_of(ONE)
        plan = SnapshotPlan(
            run=cluster.run,
            generation=1,
            atlas=atlas,
            seats=("n0",),
            groups=placement.plan_groups({"n0": None}, tolerate=0, group_size=1),
            addresses={"n0": vault.address},
        )
        client.open(plan)
        mine = Snapshotter(plan, rank=0, secret=cluster.secret)
        states = [whole_state(atlas, seed) for seed in range(4)]
        mine.begin(1, {}, shards(atlas, 0, states[1]))
        wait_until(lambda: mine.protected == 1)
        with vault.reading((1, 1)) as version:
            kept = version.data.view.copy()
            for step in (2, 3):
                wait_until(mine.ready)
                mine.begin(step, {}, shards(atlas, 0, states[step]))
                wait_until(lambda step=step: mine.protected == step)
            assert np.array_equal(version.data.view, kept)
        with vault.reading((1, 3)) as version:
            assert version.intact("data", 0)
            version.data.view[100] ^= 4
            assert not version.intact("data", 0)
        with pytest.raises(ValueError, match="not here"), vault.reading((1, 1)):
            pass
        assert vault.whole(1) == ((1, 3),)
        mine.close()
        vault.close()
        vault.close()
