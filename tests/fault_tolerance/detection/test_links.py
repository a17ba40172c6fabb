"""The delay matrix: cells, rows, columns and machines, in 5% noise."""

from __future__ import annotations

import random

import pytest

from fault_tolerance.detection.links import judge_links, judge_matrix
from fault_tolerance.detection.pairtest import (
    all_rounds,
    confirmed,
    judge_compute,
    judge_ways,
    ring_rounds,
    slow_with_fast,
)
from fault_tolerance.detection.verdict import Kind, Topology
from parallel.layout import Layout

EIGHT = Topology.one_node_each(Layout.parse("1x8x1"))


def matrix(seed: int, slow=lambda a, b: 1.0, ranks: int = 8) -> dict[tuple[int, int], float]:
    dice = random.Random(seed)
    ways = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    return {(a, b): slow(a, b) * dice.lognormvariate(0, 0.05) for a, b in ways}


@pytest.mark.parametrize("seed", range(10))
def test_a_clean_matrix_names_nobody(seed):
    assert judge_matrix(matrix(seed), EIGHT) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_cell_is_a_link(seed):
    a, b = random.Random(seed).sample(range(8), 2)
    (found,) = judge_matrix(matrix(seed, lambda x, y: 3.0 if (x, y) == (a, b) else 1.0), EIGHT)
    assert (found.kind, found.link, found.nodes) == (Kind.SLOW_LINK, (a, b), (f"node{a}", f"node{b}"))


@pytest.mark.parametrize(
    ("slow", "what"),
    [
        (lambda a, b: 2.0 if a == 5 else 1.0, "sends"),
        (lambda a, b: 2.0 if b == 5 else 1.0, "receives"),
        (lambda a, b: 2.0 if 5 in (a, b) else 1.0, "sends and receives"),
    ],
)
def test_rows_columns_and_machines_are_told_apart(slow, what):
    for seed in range(10):
        (found,) = judge_matrix(matrix(seed, slow), EIGHT)
        assert (found.ranks, found.nodes, found.link) == ((5,), ("node5",), None)
        assert f"node5 {what} 2." in found.reason or f"node5 {what} 1.9" in found.reason


def test_ways_inside_a_machine_are_not_judged_with_those_between():
    two = Topology(Layout.parse("1x4x1"), ("a", "a", "b", "b"))
    assert judge_matrix(matrix(0, lambda a, b: 9.0 if a // 2 == b // 2 else 1.0, ranks=4), two) == []


def test_a_difference_that_costs_nothing_is_none():
    ratios = {(0, 1): (5.0, 0.001), (1, 0): (1.0, 0.0), (2, 3): (1.0, 0.0)}
    assert judge_links(ratios, EIGHT, least_s=0.05) == []
    assert judge_links(ratios, EIGHT, least_s=0.0001)[0].link == (0, 1)


@pytest.mark.parametrize("n", range(2, 12))
def test_all_rounds_are_disjoint_and_meet_every_pair_once(n):
    rounds = all_rounds(range(n))
    assert len(rounds) == n - 1 + n % 2
    assert all(len({r for pair in pairs for r in pair}) == 2 * len(pairs) for pairs in rounds)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == n * (n - 1) // 2


@pytest.mark.parametrize("n", range(2, 12))
def test_ring_rounds_are_two_or_three(n):
    rounds = ring_rounds(range(n))
    assert len(rounds) == (1 if n == 2 else 2 + n % 2)
    assert all(len({r for pair in pairs for r in pair}) == 2 * len(pairs) for pairs in rounds)
    assert {frozenset(p) for pairs in rounds for p in pairs} == {frozenset((i, (i + 1) % n)) for i in range(n)}


def test_a_second_round_pairs_the_slowest_with_the_fastest():
    assert slow_with_fast({0: 3.0, 1: 1.0, 2: 9.0, 3: 2.0}) == [(2, 1), (0, 3)]


def test_a_test_confirms_the_suspicion_it_agrees_with():
    seconds = matrix(1, lambda a, b: 4.0 if (a, b) == (2, 6) else 1.0)
    tested = judge_ways(seconds, EIGHT)
    (suspicion,) = judge_links({tuple(range(8)): (3.0, 1.0)}, EIGHT)
    assert suspicion.link is None and confirmed(suspicion, tested).link == (2, 6)
    assert confirmed(suspicion, judge_ways(matrix(1), EIGHT)) is None
    (slow,) = judge_compute({0: 1.0, 1: 1.1, 2: 1.05, 3: 2.0}, EIGHT)
    assert (slow.kind, slow.ranks) == (Kind.SLOW_COMPUTE, (3,))
