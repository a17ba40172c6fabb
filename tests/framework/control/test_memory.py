"""Memory on real vaults in this process: events, tolerance, lost vaults, and plans that do not fit."""

import secrets

import pytest

from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault import Vault
from framework.config import decode
from framework.control.memory import Memory
from framework.control.pool import PoolError
from framework.plan import Plan, Refused, Seat, Source
from parallel.layout import Layout
from tests.fault_tolerance.snapshots.vaults import atlas_of, shards, wait_until, whole_state
from tests.framework.composed import composed

NODES = ("n0", "n1", "n2")
GIB = 1 << 30
FRESH = Source("fresh", 0)


class Answer:
    """An answer that is there already."""

    def __init__(self, value):
        self._value = value

    def result(self, timeout_s=0.0):
        return self._value


class Here:
    """A node's agent without its process: what Memory asks of one."""

    def __init__(self, vault, free_bytes):
        self.vault, self._free = vault, free_bytes

    def call(self, method):
        room = {"room": {f"machine {self.vault.node}": self._free}, "held_bytes": self.vault.status()["memory_bytes"]}
        return Answer({"address": self.vault.address, "facts": room}[method])


class Run:
    """A Memory, its vaults, and a plan of three data-parallel ranks on three nodes."""

    def __init__(self, **values):
        self.id, self.secret = "m" + secrets.token_hex(4), secrets.token_bytes(16)
        self.vaults = {node: Vault(node=node, run=self.id, secret=self.secret) for node in NODES}
        for vault in self.vaults.values():
            vault.start()
        self.agents = {node: Here(vault, values.pop("free_bytes", GIB)) for node, vault in self.vaults.items()}
        self.atlas = atlas_of("1x3x1")
        overrides = ["model=tiny", "data=synthetic", *(f"fault_tolerance.{key}={value}" for key, value in values.items())]
        config = decode(composed(*overrides, run_dir="unused"))
        self.memory = Memory(config, run_id=self.id, secret=self.secret.hex(), atlas=lambda layout, schedule: self.atlas)
        self.snapshotters = []

    def plan(self, generation, source=FRESH, tolerate=1):
        return Plan(
            run=self.id,
            generation=generation,
            layout=Layout(dp=3),
            schedule="1f1b",
            num_microbatches=1,
            seats=tuple(Seat(node, 0) for node in NODES),
            domains={node: node for node in NODES},
            tolerate=tolerate,
            source=source,
            options=(),
            reason="as the test wants",
        )

    def open(self, plan):
        self.memory.look(self.agents)
        order = self.memory.open(plan, self.agents)
        kept = SnapshotPlan.from_json(order["snapshots"])
        self.detach()
        self.snapshotters = [Snapshotter(kept, rank=rank, secret=self.secret) for rank in range(3)]
        return order

    def stage(self, step):
        wait_until(lambda: all(s.ready() for s in self.snapshotters))
        for s in self.snapshotters:
            s.begin(step, {"step": step}, shards(self.atlas, s.rank, whole_state(self.atlas, step)))
        for s in self.snapshotters:
            s.gate()

    def events(self):
        """Until there is one."""
        found = []
        wait_until(lambda: found.extend(self.memory.poll()) or found)
        return found

    def detach(self):
        for snapshotter in self.snapshotters:
            snapshotter.close()
        self.snapshotters = []

    def close(self):
        self.detach()
        for node in NODES:
            self.memory.forget(node)
            self.vaults[node].close()


@pytest.fixture
def run():
    run = Run(scrub_mb_s=1000)
    yield run
    run.close()


def test_a_snapshot_is_one_event_with_its_stall_and_the_tolerance_follows(run):
    run.open(run.plan(1))
    assert run.memory.tolerance() == 0, "nothing is kept yet"
    run.stage(1)
    [event] = run.events()
    assert event["protected"] and event["step"] == 1 and event["tolerance"] == 1 == run.memory.tolerance()
    assert 0 <= event["stall_ms"] < 1e4 and event["bytes"] == sum(run.memory._log.plan.node_bytes(n) for n in NODES)
    assert event["wire_bytes"] > event["bytes"] and event["hash_s"] > 0 and event["encode_s"] > 0


def test_a_vault_that_is_gone_is_known_and_takes_its_part_of_the_tolerance(run):
    run.open(run.plan(1))
    run.stage(1)
    run.events()
    run.vaults["n1"].close()
    wait_until(lambda: run.memory.poll() is not None and run.memory.lost)
    assert run.memory.lost == {"n1"} and run.memory.tolerance() == 0


def test_the_next_generation_can_spare_what_its_base_can_until_it_has_its_own(run):
    run.open(run.plan(1))
    run.stage(1)
    run.events()
    order = run.open(run.plan(2, Source("memory", 1)))
    assert order["restore"]["step"] == 1 and run.memory.protected is None
    assert run.memory.tolerance() == 1
    run.stage(1)
    [event] = run.events()
    assert event["protected"] and run.memory.protected == 1


@pytest.mark.slow
def test_a_flipped_bit_is_found_mended_and_said(run):
    run.open(run.plan(1))
    run.stage(1)
    run.events()
    run.vaults["n2"].corrupt((1, 1), "data", 0, offset=3)
    [event] = run.events()
    assert event["kind"] == "trouble" and event["repaired"] and event["nodes"] == ["n2"] and "step 1 on n2" in event["reason"]
    assert run.memory.tolerance() == 1


def test_who_is_not_reached_by_all_holds_nothing_where_the_state_decodes_without_it(run):
    """A reader at the other end of a dead way would wait for its connection in vain, before it decodes."""
    run.open(run.plan(1))
    run.stage(1)
    run.events()
    run.memory.look(run.agents, apart={"n2"})
    assert [h.node for h in run.memory.snapshot.holders] == ["n0", "n1"] and run.memory.snapshot.missing == ("n2",)
    run.memory.look(run.agents, apart={"n1", "n2"})
    assert [h.node for h in run.memory.snapshot.holders] == list(NODES), "more than may be lost: then it must be waited for"


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_opened():
    run = Run(free_bytes=40 << 10)
    try:
        run.memory.look(run.agents)
        with pytest.raises(Refused, match=r"budget: .* only 40.00 KiB is free \(machine n0\)"):
            run.memory.check_room(run.plan(1), run.agents)
    finally:
        run.close()


def test_memory_that_the_vaults_have_is_not_asked_for_twice(run):
    run.open(run.plan(1))
    for agent in run.agents.values():
        agent._free = 1 << 20
    held = run.vaults["n0"].status()["memory_bytes"]
    assert held > 100 << 10
    run.memory.check_room(run.plan(2), run.agents)


def test_a_vault_without_memory_says_why_it_does_not_take_up_a_plan(run, monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    run.memory.look(run.agents)
    with pytest.raises(PoolError, match=r"generation 1: n0: .*No space left"):
        run.memory.open(run.plan(1), run.agents)


def test_what_cannot_be_survived_is_said_in_sentences(run):
    assert run.memory.limits(run.plan(1)) == ()
    [sentence] = run.memory.limits(run.plan(1, tolerate=0))
    assert "not the loss of any node" in sentence


def test_a_node_that_left_and_came_back_between_two_looks_is_asked_where_its_vault_is_now():
    """A node left on notice, its vault ended, the node joined again: three generations in a row called the vault that was
    no more, and the run ended without progress.
    """
    config = decode(composed("model=tiny", "data=synthetic", run_dir="unused"))
    secret, atlas = secrets.token_bytes(16), atlas_of("1x3x1")
    memory = Memory(config, run_id="again", secret=secret.hex(), atlas=lambda layout, schedule: atlas)
    vaults = []
    for fence in (3, 7):
        vaults.append(Vault(node="n1", run="again", secret=secret))
        vaults[-1].start()
        vaults[-1].raise_fence(fence)
        memory.look({"n1": Here(vaults[-1], GIB)})
        assert memory.generation == fence
        vaults[-1].close()
    memory.forget("n1")
