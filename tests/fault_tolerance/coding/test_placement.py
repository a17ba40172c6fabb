"""Groups and rotated stripes, against brute force over every set of lost nodes and domains."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.coding.placement import (
    Group,
    describe,
    limits,
    num_groups,
    plan_groups,
    survives,
    survives_domain,
    tolerance,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{i:02d}" for i in range(count))


def can_decode(groups: tuple[Group, ...], lost: set[str]) -> bool:
    """By the definition: every stripe that has a lost data block keeps at least k blocks."""
    return all(
        lost.isdisjoint(stripe.data) or len(set(stripe.nodes) - lost) >= group.k
        for group in groups
        for stripe in group.stripes
    )


def test_the_drawing_of_five_nodes_and_two_parities() -> None:
    group = Group(nodes=tuple("abcde"), m=2)
    rows = [
        " ".join("P" if node in stripe.parity else str(stripe.data.index(node)) for node in group.nodes)
        for stripe in group.stripes
    ]
    assert rows == ["P P 0 1 2", "2 P P 0 1", "1 2 P P 0", "0 1 2 P P", "P 0 1 2 P"]
    assert [stripe.parity for stripe in group.stripes] == [
        ("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "a"),
    ]  # fmt: skip


@given(n=st.integers(1, 40), data=st.data())
def test_every_node_is_data_in_k_stripes_and_parity_in_m(n: int, data: st.DataObject) -> None:
    group = Group(nodes=names(n), m=data.draw(st.integers(0, n - 1)))
    assert len(group.stripes) == n
    for stripe in group.stripes:
        assert sorted(stripe.nodes) == sorted(group.nodes)
        for index, node in enumerate(stripe.data):
            assert group.block_of(node, stripe.index) == index
    for node in group.nodes:
        used = {s.index: group.block_of(node, s.index) for s in group.stripes if node in s.data}
        assert sorted(b for b in used.values() if b is not None) == list(range(group.k))
        assert {group.stripe_of(node, b): b for b in range(group.k)} == used
        held = group.parities_of(node)
        assert all(group.stripes[stripe].parity[number] == node for stripe, number in held)
        assert all(group.block_of(node, stripe) is None for stripe, _ in held)
        assert sorted(number for _, number in held) == list(range(group.m))


@pytest.mark.parametrize(
    ("count", "group_size", "tolerate", "sizes"),
    [
        (10, 4, 1, [4, 3, 3]),
        (8, 4, 2, [4, 4]),
        (8, 8, 2, [8]),
        (5, 3, 2, [5]),
        (7, 4, 3, [7]),
        (9, 4, 2, [3, 3, 3]),
        (2, 4, 1, [2]),
        (3, 4, 2, [3]),
        (5, 2, 1, [3, 2]),
        (6, 4, 0, [3, 3]),
        (1, 4, 0, [1]),
        (11, 4, 3, [6, 5]),
    ],
)
def test_numbers_that_do_not_divide(count: int, group_size: int, tolerate: int, sizes: list[int]) -> None:
    groups = plan_groups(dict.fromkeys(names(count)), tolerate=tolerate, group_size=group_size)
    assert [len(group.nodes) for group in groups] == sizes
    assert sorted(node for group in groups for node in group.nodes) == list(names(count))
    assert all(group.m == tolerate and group.k >= 1 for group in groups)


@given(count=st.integers(1, 10), data=st.data())
def test_what_is_survived_equals_brute_force(count: int, data: st.DataObject) -> None:
    tolerate = data.draw(st.integers(0, min(3, count - 1)))
    group_size = data.draw(st.integers(tolerate + 1, 8))
    nodes = {n: data.draw(st.sampled_from([None, "r0", "r1", "r2", "r3"])) for n in names(count)}
    groups = plan_groups(nodes, tolerate=tolerate, group_size=group_size)
    gone = set(data.draw(st.lists(st.sampled_from(names(count)), max_size=2)))
    for size in range(count + 1):
        for lost in map(set, combinations(nodes, size)):
            assert survives(groups, lost) == can_decode(groups, lost)
    assert tolerance(groups) >= tolerate if tolerate else tolerance(groups) == 0
    assert tolerance(groups, gone) == most_units(groups, gone, [{n} for n in nodes])
    units = [{n for n in nodes if nodes[n] == r} for r in set(nodes.values()) - {None}]
    units += [{n} for n in nodes if nodes[n] is None]
    assert tolerance(groups, gone, nodes) == most_units(groups, gone, units)
    for domain in set(nodes.values()) - {None}:
        dead = gone | {n for n in nodes if nodes[n] == domain}
        assert survives_domain(groups, domain, nodes, gone) == can_decode(groups, dead)


def most_units(groups: tuple[Group, ...], gone: set[str], units: list[set[str]]) -> int:
    """How many more of the units may die whichever they are, by trying all; a unit that is gone already is no more."""
    if not can_decode(groups, gone):
        return -1
    alive = [unit for unit in units if unit - gone]
    for count in range(1, len(alive) + 1):
        if not all(can_decode(groups, gone.union(*chosen)) for chosen in combinations(alive, count)):
            return count - 1
    return len(alive)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=10), tolerate=st.integers(1, 3), extra=st.integers(0, 6))
def test_two_nodes_of_a_domain_share_a_group_only_if_that_cannot_be_avoided(sizes, tolerate, extra) -> None:
    nodes = {f"r{r}-{i}": f"r{r}" for r, size in enumerate(sizes) for i in range(size)}
    if len(nodes) <= tolerate:
        return
    groups = plan_groups(nodes, tolerate=tolerate, group_size=tolerate + 1 + extra)
    worst = max(sum(nodes[n] == r for n in group.nodes) for group in groups for r in set(nodes.values()))
    most = len(nodes) // (tolerate + 1)  # more groups than this leave one without enough nodes
    if max(sizes) <= most:
        assert worst == 1 and not limits(groups, nodes)
    elif -(-max(sizes) // tolerate) <= most:
        assert worst <= tolerate and all(survives_domain(groups, r, nodes) for r in set(nodes.values()))
    refused = {r for r in set(nodes.values()) if not survives_domain(groups, r, nodes)}
    assert refused == {line.split("'")[1] for line in limits(groups, nodes) if "is not survived" in line}


def test_two_racks_of_four_become_pairs_across_the_racks() -> None:
    nodes = {f"{rack}{i}": rack for rack in "ab" for i in range(4)}
    groups = plan_groups(nodes, tolerate=1, group_size=4)
    assert [group.nodes for group in groups] == [("a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a3", "b3")]
    assert tolerance(groups) == 1 and tolerance(groups, domains=nodes) == 1
    assert limits(groups, nodes) == ()


def test_one_rack_alone_is_said_not_to_be_survived() -> None:
    nodes = dict.fromkeys(names(4), "rack0")
    groups = plan_groups(nodes, tolerate=1, group_size=4)
    assert len(groups) == 1 and not survives_domain(groups, "rack0", nodes)
    assert limits(groups, nodes) == (
        "losing domain 'rack0' is not survived: 4 of its nodes share a group that tolerates 1",
    )
    assert tolerance(groups, domains=nodes) == 0


def test_small_clusters_say_plainly_what_they_cannot_survive() -> None:
    alone = plan_groups({"only": None}, tolerate=0, group_size=4)
    assert "nothing survives the loss of the node" in limits(alone, {"only": None})[0]
    with pytest.raises(ValueError, match=r"got 1 and tolerate=1; .*tolerate=0 .*only durable checkpoints"):
        plan_groups({"only": None}, tolerate=1, group_size=4)
    copies = plan_groups(dict.fromkeys(names(4)), tolerate=0, group_size=4)
    assert copies[0].k == 4 and all(stripe.parity == () for stripe in copies[0].stripes)
    assert tolerance(copies) == 0 and "tolerate=0" in limits(copies, {})[0]
    assert tolerance(copies, {"n00"}) == -1
    text = describe(plan_groups(dict.fromkeys(names(10)), tolerate=1, group_size=4), {})
    assert text.startswith("groups: 1 x 4 nodes (k=3, m=1), 2 x 3 nodes (k=2, m=1); any 1 node losses")


@pytest.mark.parametrize(
    ("count", "tolerate", "group_size", "says"),
    [(4, -1, 4, ">= 0"), (3, 3, 4, "set tolerate=2"), (4, 2, 2, "above tolerate"), (4, 1, 300, "at most 255")],
)
def test_impossible_wishes_are_refused_with_a_remedy(count: int, tolerate: int, group_size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_groups(dict.fromkeys(names(count)), tolerate=tolerate, group_size=group_size)


def test_a_strange_node_or_block_is_refused() -> None:
    group = Group(nodes=("a", "b", "c"), m=1)
    with pytest.raises(ValueError, match="'d'"):
        group.block_of("d", 0)
    with pytest.raises(ValueError, match=r"0\.\.1, got 2"):
        group.stripe_of("a", 2)
    with pytest.raises(ValueError, match="distinct"):
        Group(nodes=("a", "a"), m=1)


def test_unequal_nodes_share_one_block_length_and_the_wire_meets_its_bound() -> None:
    group = Group(nodes=names(8), m=2)
    assert group.block_bytes(dict.fromkeys(group.nodes, 0)) == 0
    assert group.block_bytes({**dict.fromkeys(group.nodes, 10), "n03": 6 * 64 + 1}) == 128
    data = 6 * 64 * 1000
    assert group.wire_bytes(group.block_bytes(dict.fromkeys(group.nodes, data))) == 8 * data * 7 // 6
    assert Group(nodes=("a", "b"), m=0).wire_bytes(100) == 0


def test_the_order_of_the_nodes_does_not_matter() -> None:
    nodes = {n: f"r{i % 3}" for i, n in enumerate(names(9))}
    backwards = dict(reversed(nodes.items()))
    assert plan_groups(nodes, tolerate=1, group_size=3) == plan_groups(backwards, tolerate=1, group_size=3)


def test_a_node_without_a_domain_is_not_in_a_domain_of_its_name() -> None:
    assert num_groups({"a": None, "b": "a", "c": None, "d": None}, tolerate=1, group_size=4) == 1
    groups = plan_groups({"a": None, "b": "a", "c": None, "d": None}, tolerate=1, group_size=4)
    assert tolerance(groups, domains={"a": None, "b": "a", "c": None, "d": None}) == 1


def test_thousands_of_nodes_are_planned_quickly() -> None:
    nodes: dict[str, str | None] = {f"n{i}": f"rack{i // 32}" for i in range(5000)}
    start = time.perf_counter()
    groups = plan_groups(nodes, tolerate=2, group_size=8)
    assert all(len(group.stripes) == len(group.nodes) for group in groups)
    assert tolerance(groups) == 2 and limits(groups, nodes) == ()
    assert time.perf_counter() - start < 5
