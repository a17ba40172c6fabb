"""What is done about somebody slow: nothing that does not pay, nothing that a test does not confirm."""

from __future__ import annotations

from fault_tolerance.detection.actions import Action, choose
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from framework.trouble.weighing import Costs, Outlook, by_test, evicted, stuck_end, ways_out
from parallel.layout import Layout

TOPOLOGY = Topology(Layout(1, 4, 1), ("a", "a", "b", "b"))
COSTS = Costs(muster_s=2.0, start_worker_s=8.0)
ONE = Verdict(Kind.SLOW_COMPUTE, (2,), ("b",), "rank 2 is slow", severity=3.0)
BOTH = Verdict(Kind.SLOW_COMPUTE, (2, 3), ("b",), "b is slow", severity=3.0)


def offered(verdict: Verdict, outlook: Outlook, *, reseated: bool = False) -> list[Action]:
    found = ways_out(verdict, TOPOLOGY, outlook, COSTS, step_s=0.3, healthy_s=0.1, reseated=reseated)
    return [option.action for option in found]


def test_one_rank_of_a_machine_may_get_a_new_process_once() -> None:
    assert offered(ONE, Outlook(False, 2.0)) == [Action.IGNORE, Action.RESEAT, Action.SHRINK]
    assert offered(ONE, Outlook(False, 2.0), reseated=True) == [Action.IGNORE, Action.SHRINK]
    assert offered(BOTH, Outlook(True, 1.0)) == [Action.IGNORE, Action.SWAP]


def test_who_cannot_be_done_without_stays() -> None:
    assert offered(BOTH, Outlook(False, None)) == [Action.IGNORE]


def test_a_smaller_layout_that_is_as_slow_as_the_slow_machine_is_never_chosen() -> None:
    options = ways_out(BOTH, TOPOLOGY, Outlook(False, 2.0), COSTS, step_s=0.15, healthy_s=0.1, reseated=True)
    chosen = choose(options, step_s=0.15, healthy_step_s=0.1, steps_left=100_000, lost_s=1000.0)
    assert chosen.action is Action.IGNORE and "never pays" in chosen.comparison[-1]


def test_a_costly_action_waits_until_as_much_was_lost_as_it_costs() -> None:
    options = ways_out(BOTH, TOPOLOGY, Outlook(True, 1.0), COSTS, step_s=0.3, healthy_s=0.1, reseated=True)
    early = choose(options, step_s=0.3, healthy_step_s=0.1, steps_left=1000, lost_s=1.9)
    late = choose(options, step_s=0.3, healthy_step_s=0.1, steps_left=1000, lost_s=2.1)
    assert (early.action, late.action) == (Action.IGNORE, Action.SWAP)


def test_a_suspicion_is_confirmed_by_a_test_that_names_the_same_rank_only() -> None:
    ways: list[tuple[int, int, float]] = []
    assert by_test(ONE, [0.01, 0.01, 0.029, 0.01], ways, TOPOLOGY) is not None
    assert by_test(ONE, [0.01, 0.029, 0.01, 0.01], ways, TOPOLOGY) is None
    assert by_test(ONE, [0.010, 0.011, 0.0115, 0.010], ways, TOPOLOGY) is None


def test_a_slow_way_is_confirmed_by_the_messages_of_the_test() -> None:
    nodes = Topology(Layout(1, 4, 1), ("a", "b", "c", "d"))
    suspicion = Verdict(Kind.SLOW_LINK, (1, 2), ("b", "c"), "slow", link=(1, 2), severity=3.0)
    ways = [(a, b, 0.004 if {a, b} == {1, 2} else 0.001) for a in range(4) for b in range(4) if a != b]
    assert by_test(suspicion, [0.01] * 4, ways, nodes) is not None
    assert by_test(suspicion, [0.01] * 4, [(a, b, 0.001) for a, b, _ in ways], nodes) is None
    assert evicted(suspicion) == "c"


def test_of_ways_that_were_stuck_the_machine_goes_that_they_share() -> None:
    assert stuck_end([("a", "b")]) is None
    assert stuck_end([("c", "d"), ("a", "b")]) is None
    assert stuck_end([("a", "b"), ("a", "b")]) == "a"
    assert stuck_end([("c", "b"), ("a", "b")]) == "b"
    assert stuck_end([("c", "b"), ("a", "d"), ("a", "b")]) == "a"
