"""The catalogue against brute force: a snapshot is listed exactly if every stripe has k blocks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.snapshots.catalogue import Snapshot, catalogue
from tests.fault_tolerance.snapshots.test_slab import plan_of


def inventory(plan, node, versions):
    return {
        "node": node,
        "run": "r",
        "address": f"{node}:1",
        "generation": plan.generation,
        "plans": {plan.fingerprint: plan.to_json()},
        "versions": versions,
    }


def version(plan, step, *, data=True, parity=None, bad=(), state="protected", metas=None):
    m = plan.groups[0].m
    return {
        "generation": plan.generation,
        "step": step,
        "plan": plan.fingerprint,
        "state": state,
        "data": data,
        "parity": list(range(m)) if parity is None else parity,
        "bad": [list(item) for item in bad],
        "metas": {n: {"digest": "01", "extras": {"0": {"step": step}}} for n in (metas or plan.nodes)},
        "reason": "",
    }


@pytest.mark.parametrize(("nodes", "tolerate"), [(2, 1), (4, 2), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((4, 1), (5, 3), (6, 2)))])
def test_every_pattern_of_up_to_m_losses_is_listed_and_no_other(nodes, tolerate):
    plan = plan_of("2x2x2", nodes, tolerate)
    everything = [inventory(plan, node, [version(plan, 7)]) for node in plan.nodes]
    for count in range(nodes + 1):
        for lost in itertools.combinations(range(nodes), count):
            found = catalogue([item for i, item in enumerate(everything) if i not in lost], run="r")
            if count <= tolerate:
                assert found.newest is not None
                assert found.newest.spare == tolerate - count
                assert found.newest.missing == tuple(plan.nodes[i] for i in lost)
                assert found.newest.digest == nodes
            else:
                assert found.newest is None
                assert len(found.rejected) == (count < nodes)
                assert all("blocks it needs" in item.reason for item in found.rejected)


@given(st.data())
def test_any_set_of_blocks_is_judged_as_brute_force_does(data):
    plan = plan_of("2x2x2", 5, 2)
    group = plan.groups[0]
    has = {node: (data.draw(st.booleans()), data.draw(st.sets(st.integers(0, 1)))) for node in plan.nodes}
    parts = [inventory(plan, n, [version(plan, 3, data=d, parity=sorted(p))]) for n, (d, p) in has.items()]
    found = catalogue(parts, run="r")
    known = [
        sum(has[n][0] or plan.real_bytes(n, block) == 0 for block, n in enumerate(stripe.data))
        + sum(number in has[n][1] for number, n in enumerate(stripe.parity))
        for stripe in group.stripes
    ]
    expected = all(count >= group.k for count in known) and any(held or parity for held, parity in has.values())
    assert (found.newest is not None) == expected


def test_a_snapshot_that_is_only_staged_counts_as_long_as_nobody_is_lost():
    plan = plan_of("2x2x2", 4, 1)
    everything = [inventory(plan, node, [version(plan, 9, parity=[], state="staged")]) for node in plan.nodes]
    found = catalogue(everything, run="r").newest
    assert found is not None
    assert not found.protected
    assert found.spare == 0
    assert catalogue(everything[1:], run="r").newest is None


def test_damage_in_different_chunks_is_survived_and_in_the_same_chunk_is_not():
    plan = plan_of("2x2x2", 4, 1, chunk_bytes=64)
    stripe = plan.groups[0].stripes[0]
    first, second = stripe.data[0], stripe.data[1]

    def judged(chunk_of_second):
        bad = {first: [("data", 0, 5)], second: [("data", 1, chunk_of_second)]}
        parts = [inventory(plan, n, [version(plan, 1, bad=bad.get(n, ()))]) for n in plan.nodes]
        return catalogue(parts, run="r")

    assert judged(6).newest is not None
    assert judged(5).newest is None
    assert "chunk 5" in judged(5).rejected[0].reason


def test_the_newest_step_comes_first_and_the_newest_generation_of_a_step():
    old, new = plan_of("2x2x2", 3), plan_of("1x2x2", 3, base=(3, 5))
    new = type(new).from_json(new.to_json() | {"generation": 4})
    parts = [inventory(old, n, [version(old, 5), version(old, 8, data=n != "n1", metas=["n0", "n2"])]) for n in old.nodes]
    parts += [inventory(new, n, [version(new, 5)]) for n in new.nodes]
    found = catalogue(parts, run="r")
    assert [snapshot.key for snapshot in found.snapshots] == [(4, 5), (3, 5)]
    assert [(item.step, item.reason) for item in found.rejected] == [(8, "nodes n1 had not staged it, as far as is known")]


def test_another_run_is_ignored_and_nothing_gives_nothing():
    plan = plan_of("2x2x2", 3)
    strangers = [inventory(plan, n, [version(plan, 5)]) | {"run": "other"} for n in plan.nodes]
    assert catalogue(strangers, run="r").newest is None
    assert catalogue([], run="r").snapshots == ()


def test_a_snapshot_goes_through_json_unchanged():
    plan = plan_of("2x2x2", 4, 2)
    parts = [inventory(plan, n, [version(plan, 7, bad=[("parity", 1, 0)])]) for n in plan.nodes[1:]]
    snapshot = catalogue(parts, run="r").newest
    assert snapshot is not None
    again = Snapshot.from_json(snapshot.to_json())
    assert again == snapshot
    assert again.holder("n1") == snapshot.holder("n1")
    assert again.extra == {"step": 7}
