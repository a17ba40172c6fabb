"""What vaults and ranks say, put together: events that are whole, and a tolerance that is true at each moment."""

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.catalogue import Holder, Snapshot
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from framework.control.snapshot_log import SnapshotLog
from tests.fault_tolerance.snapshots.vaults import atlas_of

NODES = ("a", "b", "c")


def plan_of(tolerate=1, generation=4):
    return SnapshotPlan(
        run="r",
        generation=generation,
        atlas=atlas_of("1x3x1"),
        seats=NODES,
        groups=plan_groups(dict.fromkeys(NODES), tolerate=tolerate, group_size=3),
        addresses=dict.fromkeys(NODES, "x:1"),
    )


def base_of(spare=2):
    holders = tuple(Holder(node, "x:1", True, frozenset({0})) for node in NODES)
    return Snapshot(plan_of(generation=3), 7, holders, True, 0, {}, spare, ())


def part(step, state="protected", **more):
    values = {"bytes": 10, "wire_bytes": 5, "copy_s": 0.1, "stage_s": 0.2, "encode_s": 0.3, "total_s": 0.4, "reason": ""}
    return {"kind": "snapshot", "generation": 4, "step": step, "state": state, **values, **more}


def gated(step, rank, stall_s):
    return {"kind": "gated", "generation": 4, "step": step, "rank": rank, "stall_s": stall_s}


def hear_all(log, step, **more):
    for node in NODES:
        log.hear(node, part(step, **more))


def test_an_event_is_whole_when_all_vaults_and_all_ranks_have_spoken():
    log = SnapshotLog(plan_of(), None)
    hear_all(log, 5)
    assert log.take() == [] and log.protected == 5
    for rank, stall_s in enumerate((0.001, 0.004, 0.002)):
        log.hear(NODES[rank], gated(5, rank, stall_s))
    [event] = log.take()
    assert (event["stall_ms"], event["bytes"], event["wire_bytes"], event["encode_s"]) == (4.0, 30, 15, 0.3)
    assert event["protected"] and log.take() == []


def test_a_stall_that_nobody_will_tell_does_not_hold_the_event_for_ever():
    log = SnapshotLog(plan_of(), None)
    hear_all(log, 5)
    log.hear("a", gated(5, 0, 0.001))
    hear_all(log, 6)
    assert [(e["step"], e["stall_ms"]) for e in log.take()] == [(5, None)]
    assert [(e["step"], e["stall_ms"]) for e in log.take(last=True)] == [(6, None)]


def test_a_snapshot_that_was_given_up_says_why_and_protects_nothing():
    log = SnapshotLog(plan_of(), None)
    hear_all(log, 5, state="abandoned", reason="node b: too slow")
    [event] = log.take(last=True)
    assert not event["protected"] and event["reason"] == "node b: too slow" and log.protected is None


def test_another_generation_is_not_heard():
    log = SnapshotLog(plan_of(), None)
    hear_all(log, 5, generation=3)
    assert log.protected is None and log.take(last=True) == []


def test_the_tolerance_is_that_of_the_base_until_the_generation_has_a_snapshot_of_its_own():
    log = SnapshotLog(plan_of(), base_of(spare=2))
    assert log.tolerance(()) == 2
    assert log.tolerance({"b"}) == 1
    assert log.tolerance({"stranger"}) == 2
    hear_all(log, 8)
    assert log.tolerance(()) == 1
    assert log.tolerance({"b"}) == 0
    assert log.tolerance({"b", "c"}) == 0, "nothing less than nothing"
    assert SnapshotLog(plan_of(), None).tolerance(()) == 0


def test_damage_that_could_not_be_repaired_takes_one_off_the_tolerance():
    log = SnapshotLog(plan_of(), None)
    hear_all(log, 5)
    log.take(last=True)
    damage = {"kind": "bad_chunk", "generation": 4, "step": 5, "block": "data 1", "chunk": 3}
    log.hear("b", damage | {"repaired": True})
    assert log.tolerance(()) == 1
    [event] = log.take()
    assert event["kind"] == "trouble" and "chunk 3 of data 1 of step 5 on b" in event["reason"]
    log.hear("b", damage | {"repaired": False})
    assert log.tolerance(()) == 0 and "erased" in log.take()[0]["reason"]
    hear_all(log, 6)
    assert log.tolerance(()) == 1
