"""Pair test: which passes of disjoint pairs measure every way, and what the measurements say.

    6 ranks, all ways: 5 rounds     0-5 1-4 2-3 | 5-3 0-2 ...      nobody is in two pairs of one round,
    a ring of n:       2 rounds     0-1 2-3 4-5 | 1-2 3-4 5-0      so no measurement disturbs another
                       3 if n is odd

A suspect is confirmed by this test before anything costly is done: records of training show that something is slow, a
message that crosses one way only shows which.

Rule of this file: pure; `pairs.py` runs it. Source: GREYHOUND's validation passes; DLRover's second round of slow with fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fault_tolerance.detection.links import judge_matrix
from fault_tolerance.detection.verdict import Kind, Topology, Verdict

Pair = tuple[int, int]

SLOW_WAY = 1.5
SLOW_RANK = 1.25


def all_rounds(ranks: Sequence[int]) -> list[list[Pair]]:
    """Rounds of disjoint pairs in which every two ranks meet once: n - 1 rounds for even n, n for odd."""
    seats: list[int | None] = list(ranks) + ([None] if len(ranks) % 2 else [])
    out = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        out.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return out


def ring_rounds(ranks: Sequence[int]) -> list[list[Pair]]:
    """Rounds that measure only the ways of a ring: two for an even ring, three for an odd one."""
    n = len(ranks)
    if n < 2:
        return []
    if n == 2:
        return [[(ranks[0], ranks[1])]]
    rounds: list[list[Pair]] = [[], []] if n % 2 == 0 else [[], [], []]
    for at in range(n):
        last = n % 2 == 1 and at == n - 1
        rounds[2 if last else at % 2].append((ranks[at], ranks[(at + 1) % n]))
    return rounds


def slow_with_fast(seconds: Mapping[int, float]) -> list[Pair]:
    """A second round of a compute test: the slowest with the fastest, and so on inwards."""
    order = sorted(seconds, key=lambda rank: seconds[rank])
    return [(order[-1 - at], order[at]) for at in range(len(order) // 2)]


def judge_ways(seconds: Mapping[Pair, float], topology: Topology, *, hot: float = SLOW_WAY) -> list[Verdict]:
    """What one-way times of messages of one size say: slow cells, rows, columns or machines."""
    if len(seconds) < 2:
        return []
    usual = statistics.median_low(list(seconds.values()))
    return judge_matrix({pair: s / usual for pair, s in seconds.items()}, topology, hot=hot)


def judge_compute(seconds: Mapping[int, float], topology: Topology, *, slow: float = SLOW_RANK) -> list[Verdict]:
    """Ranks whose time for the same computation is far above the median of all."""
    if len(seconds) < 2:
        return []
    usual = statistics.median_low(list(seconds.values()))
    out = []
    for rank, s in sorted(seconds.items()):
        if s >= slow * usual:
            reason = f"rank {rank} on {topology.nodes[rank]} computes the test in {s / usual:.2f} times the median"
            out.append(
                Verdict(Kind.SLOW_COMPUTE, (rank,), topology.on([rank]), reason, confidence=0.97, severity=s / usual)
            )
    return out


def confirmed(suspicion: Verdict, tested: Sequence[Verdict]) -> Verdict | None:
    """The verdict of a test that agrees with a suspicion: same kind, and a place inside the suspected one."""
    for verdict in tested:
        if verdict.kind == suspicion.kind and set(verdict.ranks) & set(suspicion.ranks):
            return verdict
    return None
