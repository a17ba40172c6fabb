"""Memory of snapshots per node: the formula, and refusals with numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.budget import PAGE_BYTES, budget, check

GIB = 1 << 30


def needs(nodes: int, tolerate: int, node_bytes: int, chunk_bytes: int = 4 << 20):
    names = [f"n{i}" for i in range(nodes)]
    groups = plan_groups(dict.fromkeys(names), tolerate=tolerate, group_size=max(nodes, 2))
    return budget(groups, dict.fromkeys(names, node_bytes), chunk_bytes=chunk_bytes)


@given(nodes=st.integers(2, 16), data=st.data(), node_bytes=st.integers(1 << 20, 1 << 40))
def test_shared_memory_is_two_times_d_n_over_n_minus_m(nodes: int, data: st.DataObject, node_bytes: int) -> None:
    m = data.draw(st.integers(0, nodes - 1))
    for need in needs(nodes, m, node_bytes).values():
        exact = 2 * node_bytes * nodes / (nodes - m)
        assert exact <= need.shared_bytes <= exact + 2 * (2 * PAGE_BYTES + 64 * m)
        assert need.total_bytes == need.arena_bytes + need.parity_bytes + need.transfer_bytes


def test_the_parts_of_a_node() -> None:
    need = needs(8, 2, 6 * GIB)["n3"]
    assert (need.arena_bytes, need.parity_bytes, need.transfer_bytes) == (12 * GIB, 4 * GIB, 2 * 7 * (4 << 20))
    assert str(need) == "n3: 16.05 GiB = arenas 12.00 GiB + parity 4.00 GiB + transfer 56.00 MiB"


def test_a_small_node_pays_for_its_own_state_and_the_parity_of_the_largest() -> None:
    groups = plan_groups(dict.fromkeys("abc"), tolerate=1, group_size=3)
    found = budget(groups, {"a": 1 << 20, "b": 8 << 20, "c": 0}, chunk_bytes=1 << 20)
    assert [found[n].arena_bytes for n in "abc"] == [2 << 20, 16 << 20, 0]
    assert {found[n].parity_bytes for n in "abc"} == {2 * (4 << 20)}


def test_without_parity_there_is_only_the_arena() -> None:
    need = needs(1, 0, 1000)["n0"]
    assert (need.arena_bytes, need.parity_bytes, need.transfer_bytes) == (2 * PAGE_BYTES, 0, 0)


def rooms(plan, free):
    return {node: {f"machine {node}": free} for node in plan}


def test_a_plan_that_does_not_fit_is_refused_with_numbers() -> None:
    plan = needs(4, 1, 3 * GIB)
    check(plan, rooms(plan, 9 * GIB))
    check(plan, {})
    with pytest.raises(ValueError) as refused:
        check(plan, rooms(plan, 9 * GIB) | {"n2": {"machine n2": 9 * GIB, "cgroup 7": 8 * GIB}})
    text = str(refused.value)
    assert "n2: 8.02 GiB = arenas 6.00 GiB + parity 2.00 GiB" in text and "only 8.00 GiB is free (cgroup 7)" in text
    assert "n0" not in text and "fault_tolerance.tolerate" in text and "\n" not in text
    with pytest.raises(ValueError, match="chunk_bytes must be > 0, got 0"):
        needs(4, 1, 1, chunk_bytes=0)


def test_nodes_that_share_a_machine_must_fit_into_it_together() -> None:
    """Four emulated nodes each fitted into the free memory of the one machine, and together took four times that."""
    plan = needs(4, 1, 3 * GIB)
    check(plan, {key: {"machine a": 33 * GIB} for key in plan})
    with pytest.raises(ValueError, match=r"n0..n3, which share machine a, need 32.09 GiB, but only 20.00 GiB is free"):
        check(plan, {key: {"machine a": 20 * GIB} for key in plan})


def test_memory_that_a_vault_has_already_is_not_asked_for_again() -> None:
    plan = needs(4, 1, 3 * GIB)
    check(plan, rooms(plan, GIB), dict.fromkeys(plan, 8 * GIB))
    with pytest.raises(ValueError, match=r"of which 4.00 GiB are there already, but only 1.00 GiB is free"):
        check(plan, rooms(plan, GIB), dict.fromkeys(plan, 8 * GIB) | {"n1": 4 * GIB})
