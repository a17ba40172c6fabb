"""Restores: any layout onto any other, from whatever is left, bit for bit."""

import random

import pytest
import torch

from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.restore import Reader, share
from tests.fault_tolerance.snapshots.vaults import (
    VaultCluster,
    atlas_of,
    empty_shards,
    same_bits,
    shards,
    wait_until,
    whole_state,
)
from tests.gpu import needs_gpu

pytestmark = pytest.mark.slow

LAYOUTS = ("1x1x1", "2x2x2", "4x1x2", "1x3x2", "2x1x4", "1x8x1", "2x3x1", "4x2x1", "1x2x4", "1x1x8", "1x4x1 flat", "1x3x1 groups")
SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv_zero_bubble")


@pytest.fixture(scope="module")
def cluster():
    with VaultCluster(5) as vaults:
        yield vaults


def protect(cluster, layout, *, generation, seed=0, tolerate=2, schedule="1f1b", width=24, chunk_bytes=4096):
    atlas = atlas_of(layout, schedule=schedule, width=width)
    plan = cluster.plan(atlas, tolerate=tolerate, generation=generation, chunk_bytes=chunk_bytes)
    cluster.open(plan)
    state = whole_state(atlas, seed)
    cluster.protect(plan, 1, state)
    return plan, state


def test_restores_onto_other_layouts_equal_direct_slicing(cluster):
    """A property over pairs of layouts, schedules, chunk sizes and losses."""
    rng = random.Random(7)
    for generation in range(1, 7):
        old, schedule = rng.choice(LAYOUTS), rng.choice(SCHEDULES)
        if old.startswith("4") or " " in old:
            schedule = "1f1b"  # four layers are not enough for eight stages
        chunk = rng.choice([320, 1024, 4096, 1 << 18])
        _, state = protect(
            cluster, old, generation=generation, seed=generation, schedule=schedule, chunk_bytes=chunk
        )
        for _ in range(3):
            lost = rng.sample(list(cluster.vaults), rng.randint(0, 2))
            new = atlas_of(rng.choice(LAYOUTS))
            nodes = [rng.choice(list(cluster.vaults)) for _ in range(new.layout.world)]
            tensors, _ = cluster.restore(cluster.catalogue(without=lost).newest, new, node_of_rank=nodes)
            assert all(same_bits(t, shards(new, rank, state)) for rank, t in enumerate(tensors))


def test_a_rank_that_stays_where_it_was_reads_from_its_own_node_alone(cluster):
    plan, state = protect(cluster, "1x5x1", generation=20)
    tensors, stats = cluster.restore(cluster.catalogue().newest, plan.atlas, node_of_rank=plan.seats)
    assert all(same_bits(t, shards(plan.atlas, rank, state)) for rank, t in enumerate(tensors))
    assert {s.tier for s in stats} <= {"local", "peer_memory"}
    assert sum(s.local_bytes for s in stats) > 10 * sum(s.fetched_bytes for s in stats) > 0  # replicated norms and scalars


def test_only_what_is_needed_is_decoded(cluster):
    plan, state = protect(cluster, "1x5x1", generation=21, chunk_bytes=1024)
    lost = plan.seats[2]
    tensors, stats = cluster.restore(cluster.catalogue(without=[lost]).newest, plan.atlas, node_of_rank=plan.seats)
    assert all(same_bits(t, shards(plan.atlas, rank, state)) for rank, t in enumerate(tensors))
    decoded = [s.decoded_bytes for s in stats]
    assert decoded[2] == pytest.approx(plan.node_bytes(lost), rel=0.1)
    assert sum(decoded) - decoded[2] < 0.2 * decoded[2]  # shared small tensors
    assert stats[2].fetched_bytes <= 3.5 * plan.node_bytes(lost)
    assert stats[2].tier == "parity"


def test_small_tensors_that_share_a_chunk_are_fetched_once(cluster):
    plan, _ = protect(cluster, "1x5x1", generation=22, chunk_bytes=1 << 18)
    atlas = atlas_of("1x1x1")
    _, stats = cluster.restore(cluster.catalogue().newest, atlas)
    assert stats[0].fetched_bytes == sum(plan.node_bytes(node) for node in plan.nodes)


def test_a_vault_that_dies_during_the_restore_is_decoded_around():
    with VaultCluster(4) as vaults:
        plan, state = protect(vaults, "2x2x2", generation=1, width=96, tolerate=2)
        found = vaults.catalogue().newest
        vaults.vaults["n1"].kill()  # after the catalogue was made: it still speaks of n1
        vaults.vaults["n3"].kill()
        atlas = atlas_of("1x1x1", width=96)
        tensors, stats = vaults.restore(found, atlas)
        assert same_bits(tensors[0], shards(atlas, 0, state))
        assert stats[0].decoded_bytes == plan.node_bytes("n1") + plan.node_bytes("n3")


def test_another_model_is_refused(cluster):
    protect(cluster, "1x5x1", generation=23)
    atlas = atlas_of("1x1x1", width=32)
    reader = Reader(cluster.catalogue().newest, node="n0", secret=cluster.secret)
    with pytest.raises(ValueError, match="same model"):
        reader.restore(atlas, 0, empty_shards(atlas, 0))
    reader.close()


def test_a_wrong_element_is_seen_in_the_digest(cluster):
    _, state = protect(cluster, "1x5x1", generation=24)
    atlas = atlas_of("1x2x1")
    snapshot = Snapshot.from_json(cluster.catalogue().newest.to_json())
    tensors = [shards(atlas, rank, state) for rank in range(2)]

    def total():
        return sum(share(atlas, rank, tensors[rank]) for rank in range(2)) % (1 << 64)

    assert total() == snapshot.digest
    piece = next(piece for piece in tensors[1] if piece.tensor == "exp_avg/2.wide")
    tensors[1][piece].view(torch.int32)[3, 4] ^= 1
    assert total() != snapshot.digest


def test_restored_bytes_land_in_the_tensors_that_were_given(cluster):
    """Live memory is filled in place: an engine's parameters keep their storage."""
    plan, state = protect(cluster, "1x5x1", generation=25)
    tensors = empty_shards(plan.atlas, 0)
    places = {piece: tensor.data_ptr() for piece, tensor in tensors.items()}
    reader = Reader(cluster.catalogue().newest, node="n0", secret=cluster.secret)
    reader.restore(plan.atlas, 0, tensors)
    reader.close()
    assert {piece: tensor.data_ptr() for piece, tensor in tensors.items()} == places
    assert same_bits(tensors, shards(plan.atlas, 0, state))


@needs_gpu
def test_a_state_on_a_gpu_is_protected_lost_and_read_back_onto_it_to_the_bit(cluster):
    """A scalar could not be written to a device: its bytes came as an array of one element."""
    atlas = atlas_of("1x1x1", width=96)
    plan = cluster.plan(atlas, tolerate=1, generation=40, chunk_bytes=1 << 16)
    cluster.open(plan)
    state = whole_state(atlas, 5)
    on_device = {piece: tensor.cuda() for piece, tensor in shards(atlas, 0, state).items()}
    for step in (1, 2):
        wait_until(cluster.snapshotters[0].ready)
        cluster.snapshotters[0].begin(step, {"step": step}, on_device)
        cluster.snapshotters[0].gate()
        wait_until(lambda step=step: cluster.snapshotters[0].protected == step)
    assert list(cluster.snapshotters[0]._devices._pinned), "a vault's memory must be one that the driver pins"
    for lost in ([], [plan.seats[0]]):
        found = cluster.catalogue(without=lost).newest
        back = {piece: torch.empty_like(tensor) for piece, tensor in on_device.items()}
        reader = Reader(found, node="elsewhere", secret=cluster.secret)
        stats = reader.restore(atlas, 0, back)
        assert share(atlas, 0, back) == found.digest
        reader.close()
        assert bool(stats.decoded_bytes) == bool(lost)
        assert same_bits({piece: tensor.cpu() for piece, tensor in back.items()}, shards(atlas, 0, state))
