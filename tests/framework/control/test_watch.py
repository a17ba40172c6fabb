"""Watching: what is seen of a crew, and the trouble that is read out of it."""

from __future__ import annotations

from dataclasses import replace

from framework.control.incident import HOLD, Trouble
from framework.control.watch import Ended, Limits, Sight, judge
from framework.plan import Plan, Seat, Source
from parallel.layout import Layout

PLAN = Plan(
    run="r",
    generation=1,
    layout=Layout(2, 2, 1),
    schedule="1f1b",
    num_microbatches=4,
    seats=tuple(Seat(f"n{i // 2}", i % 2) for i in range(4)),
    domains={"n0": "n0", "n1": "n1"},
    tolerate=1,
    source=Source("fresh", 0),
    options=(),
    reason="",
)
LIMITS = Limits(ping_timeout_s=4.0, stall_s=15.0)
CALM = Sight(
    now=1000.0,
    ended={},
    silent_s=dict.fromkeys(range(4), 0.1),
    progress=dict.fromkeys(range(4), (7, "forward")),
    quiet_s=0.2,
    dead_nodes=frozenset(),
    draining=frozenset(),
)


def see(**seen: object) -> Sight:
    return replace(CALM, **seen)  # type: ignore[arg-type]


def test_a_crew_that_works_is_in_no_trouble() -> None:
    assert judge(CALM, PLAN, LIMITS) is None


def test_a_dead_process_is_a_crash_although_its_neighbours_failed_first() -> None:
    ended = {
        0: Ended("collective", "Connection closed by peer", 1.0),
        3: Ended("died", "killed by signal 9", 1.1),
    }
    trouble = judge(see(ended=ended, collective_broken_s=9.0), PLAN, LIMITS)
    assert trouble is not None
    assert (trouble.kind, trouble.ranks, trouble.nodes, trouble.step) == ("crash", (3,), ("n1",), 7)
    assert trouble.evidence == "killed by signal 9"


def test_one_silent_rank_hangs_and_all_silent_ones_only_after_much_longer() -> None:
    """On a machine with thirty processes for each core the controller slept five seconds, and called all of its eight ranks hung."""
    one = judge(see(silent_s=dict.fromkeys(range(4), 0.1) | {2: 4.5}), PLAN, LIMITS)
    assert one is not None and (one.kind, one.ranks) == ("hang", (2,))
    most = judge(see(silent_s=dict.fromkeys(range(4), 4.5) | {2: 0.1}), PLAN, LIMITS)
    assert most is not None and most.ranks == (0, 1, 3)
    assert judge(see(silent_s=dict.fromkeys(range(4), 15.0)), PLAN, LIMITS) is None
    everybody = judge(see(silent_s=dict.fromkeys(range(4), 16.5)), PLAN, LIMITS)
    assert everybody is not None and everybody.ranks == (0, 1, 2, 3)


def test_a_dead_node_outweighs_its_dead_processes() -> None:
    ended = {2: Ended("died", "unreachable", 1.0)}
    trouble = judge(see(ended=ended, dead_nodes=frozenset({"n1", "elsewhere"})), PLAN, LIMITS)
    assert trouble is not None
    assert (trouble.kind, trouble.ranks, trouble.nodes) == ("node_loss", (2, 3), ("n1",))


def test_an_error_of_its_own_names_the_rank_that_had_it_first() -> None:
    ended = {1: Ended("error", "ValueError: second", 2.0), 2: Ended("error", "KeyError: first", 1.0)}
    trouble = judge(see(ended=ended), PLAN, LIMITS)
    assert trouble is not None and (trouble.kind, trouble.ranks) == ("crash", (2,))


def test_a_rank_that_does_not_answer_hangs() -> None:
    trouble = judge(see(silent_s={0: 0.1, 1: 4.5, 2: 0.1, 3: 0.1}), PLAN, LIMITS)
    assert trouble is not None and (trouble.kind, trouble.ranks) == ("hang", (1,))


def test_a_broken_collective_waits_for_better_evidence_then_blames_nobody() -> None:
    ended = {0: Ended("collective", "Connection closed by peer", 1.0)}
    assert judge(see(ended=ended, collective_broken_s=1.0), PLAN, LIMITS) is None
    trouble = judge(see(ended=ended, collective_broken_s=3.5), PLAN, LIMITS)
    assert trouble is not None and (trouble.kind, trouble.ranks) == ("crash", ())


def test_no_progress_blames_the_few_that_are_behind() -> None:
    progress = {0: (8, "forward"), 1: (7, "gate"), 2: (8, "forward"), 3: (8, "forward")}
    trouble = judge(see(progress=progress, quiet_s=20.0), PLAN, LIMITS)
    assert trouble is not None and (trouble.kind, trouble.ranks) == ("hang", (1,))
    together = judge(see(quiet_s=20.0), PLAN, LIMITS)
    assert together is not None and (together.kind, together.ranks) == ("hang", ())


def test_a_notice_to_leave_is_planned_trouble() -> None:
    trouble = judge(see(draining=frozenset({"n0"})), PLAN, LIMITS)
    assert trouble is not None and trouble.planned and trouble.kind == "preemption"


def test_a_process_that_was_asked_to_leave_is_named_by_its_rank_and_a_whole_node_by_its_name() -> None:
    alone = judge(see(leaving=frozenset({3})), PLAN, LIMITS)
    assert alone is not None and alone.planned
    assert (alone.ranks, alone.nodes, alone.evidence) == ((3,), ("n1",), "the process of rank 3 asked to leave by SIGTERM")
    whole = judge(see(leaving=frozenset({2, 3}), draining=frozenset({"n1"})), PLAN, LIMITS)
    assert whole is not None and (whole.ranks, whole.evidence) == ((2, 3), "n1 asked to leave")


def test_who_is_in_trouble_is_said_once() -> None:
    # "hang: rank 2 on n1: rank 2 on n1 did not come to ..." was what a person had to read.
    hung = Trouble("hang", (2,), ("n1",), "rank 2 on n1 did not come to allreduce #4", 7, 0.0)
    assert str(hung) == "hang: rank 2 on n1 did not come to allreduce #4"
    assert str(replace(hung, evidence="does not answer")) == "hang: rank 2 on n1: does not answer"


def test_who_loses_a_vault_and_no_rank_ends_at_a_step_boundary_and_keeps_its_state() -> None:
    """All vaults were killed, all ranks were well, and the run was over: nobody had the state, as it was said."""
    trouble = judge(see(vaults_lost=frozenset({"n0", "n1"})), PLAN, LIMITS)
    assert trouble is not None and trouble.planned
    assert (trouble.kind, trouble.nodes, trouble.remedy) == ("crash", ("n0", "n1"), HOLD)
    worse = judge(see(vaults_lost=frozenset({"n0"}), ended={1: Ended("died", "killed by signal 9", 1.0)}), PLAN, LIMITS)
    assert worse is not None and (worse.ranks, worse.planned) == ((1,), False)
    still = judge(see(vaults_lost=frozenset({"n0"}), quiet_s=16.0), PLAN, LIMITS)
    assert still is not None and (still.kind, still.planned) == ("hang", False), "who does not step never comes to a boundary"
