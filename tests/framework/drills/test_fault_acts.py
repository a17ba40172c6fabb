"""What faults do beyond one process, on real vaults and real sockets."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from framework.drills.fault_acts import corrupt_block
from parallel.sockets import pace
from tests.fault_tolerance.snapshots.vaults import (
    VaultCluster,
    atlas_of,
    empty_shards,
    same_bits,
    shards,
    wait_until,
    whole_state,
)

pytestmark = pytest.mark.slow


def test_blocks_that_a_vault_holds_are_damaged_and_a_restore_after_a_node_loss_decodes_around_them() -> None:
    atlas, after = atlas_of("2x2x1"), atlas_of("1x3x1")
    with VaultCluster(4) as cluster:
        plan = cluster.plan(atlas, tolerate=2, scrub_bytes_s=0.0)
        cluster.open(plan)
        state = whole_state(atlas, 5)
        cluster.protect(plan, 3, state)
        corrupt_block("n2", num_blocks=1, run=cluster.run, secret=cluster.secret)
        cluster.vaults["n1"].kill()
        snapshot = cluster.catalogue().newest
        assert snapshot is not None and snapshot.missing == ("n1",)
        tensors, stats = cluster.restore(snapshot, after, node_of_rank=["n0", "n2", "n3"])
        wanted = [shards(after, rank, state) for rank in range(3)]
        assert all(same_bits(a, b) for a, b in zip(tensors, wanted, strict=True))
        assert sum(s.bad_chunks for s in stats) > 0, "the damage was met, and decoded around"
        assert empty_shards(after, 0).keys() == tensors[0].keys()


def test_damage_waits_for_the_newest_snapshot_to_be_protected() -> None:
    """A drill that damages a block of step n while it is on its way would find an older one, or none."""
    atlas = atlas_of("2x1x1")
    with VaultCluster(2) as cluster:
        plan = cluster.plan(atlas, tolerate=1, scrub_bytes_s=0.0)
        cluster.open(plan)
        work = threading.Thread(
            target=corrupt_block, args=("n1",), kwargs={"num_blocks": 1, "run": cluster.run, "secret": cluster.secret}
        )
        work.start()
        time.sleep(0.2)
        assert work.is_alive()
        cluster.protect(plan, 1, whole_state(atlas, 1))
        wait_until(lambda: not work.is_alive())
        snapshot = cluster.catalogue().newest
        assert snapshot is not None and snapshot.step == 1
        _, stats = cluster.restore(snapshot, atlas)
        assert sum(s.bad_chunks for s in stats) > 0


def test_a_paced_connection_sends_at_its_rate_and_no_other_one_does() -> None:
    megabytes, rate = 4, 20
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        held, free = socket.create_connection(address), socket.create_connection(address)
        ends = [server.accept()[0] for _ in range(2)]
        assert pace(mine=[held.getsockname()], theirs=[], bytes_per_s=rate * 1_000_000) == 1
        took = {name: _seconds(near, far, megabytes) for name, near, far in (("held", held, ends[0]), ("free", free, ends[1]))}
        for end in (held, free, *ends):
            end.close()
    assert took["held"] > 0.7 * megabytes / rate > took["free"]


def _seconds(near: socket.socket, far: socket.socket, megabytes: int) -> float:
    data = bytes(megabytes * 1_000_000)
    began = time.monotonic()
    sender = threading.Thread(target=near.sendall, args=(data,))
    sender.start()
    left = len(data)
    while left:
        left -= len(far.recv(1 << 20))
    sender.join()
    return time.monotonic() - began
