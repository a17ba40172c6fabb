"""The matrix: every loss at every phase is a cell, and what a cell must show is told from a run's rows and events."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from framework.drills.faults import PHASES
from framework.drills.matrix import Cell, cells, faults, left_to_do, steady, table, wrong

NODES = ("n2", "n0", "n3", "n1")  # by place; they change theirs with every loss


def rows(*steps: int, generation: int = 3, tolerance: int = 2) -> list[dict[str, Any]]:
    return [{"step": s, "samples": [8 * (s - 1), 8 * s - 1], "generation": generation, "tolerance": tolerance} for s in steps]


def plan(layout: str = "2x2x2", generation: int = 3, nodes: tuple[str, ...] = NODES) -> dict[str, Any]:
    return {"kind": "plan", "time": 1.0, "layout": layout, "generation": generation, "seats": [f"{n}.{s}" for n in nodes for s in (0, 1)]}


def incident(kind: str, *, lost: int = 1, at: float = 20.0) -> dict[str, Any]:
    return {"kind": "resized", "time": at, "incident": {"kind": kind, "steps_lost": lost}}


def test_every_node_and_every_pair_is_lost_once_at_every_phase() -> None:
    found = cells("2x2x2", nodes=4, most=2)
    losses = [*combinations(range(4), 1), *combinations(range(4), 2)]
    assert sorted(map(str, found)) == sorted(str(Cell("2x2x2", places, phase)) for places in losses for phase in PHASES)
    assert {cell.phase for cell in found[:9]} == set(PHASES), "what is done first is of all kinds"


def test_nodes_are_killed_at_one_step_and_phase() -> None:
    both = faults(Cell("2x2x2", (0, 3), "staging"), NODES, ranks_a_node=2, step=9)
    assert [(f.step, f.kind, f.phase, f.node) for f in both] == [(9, "kill_node", "staging", "n2"), (9, "kill_node", "staging", "n1")]


def test_during_another_recovery_means_that_something_was_lost_before() -> None:
    one = faults(Cell("2x2x2", (3,), "recovery"), NODES, ranks_a_node=2, step=9)
    assert [(f.kind, f.phase, f.rank, f.node) for f in one] == [("kill_worker", "forward", 0, None), ("kill_node", "recovery", None, "n1")]
    two = faults(Cell("2x2x2", (0, 2), "recovery"), NODES, ranks_a_node=2, step=9)
    assert [(f.kind, f.phase, f.node) for f in two] == [("kill_node", "forward", "n2"), ("kill_node", "recovery", "n3")]
    assert two[1].step < two[0].step, "else a loss that comes before its step is told would not set it off"


@pytest.mark.parametrize(
    ("events", "written", "is_steady"),
    [
        ([plan()], rows(1, 2, 3), True),
        ([], [], False),
        ([plan("2x1x2")], rows(1, 2, 3), False),
        ([plan(nodes=NODES[:3])], rows(1, 2, 3), False),
        ([plan(generation=4)], rows(1, 2, 3), False),
        ([plan()], rows(1), False),
        ([plan()], rows(1, 2, 3, tolerance=1), False),
    ],
)
def test_a_crew_is_steady_on_all_nodes_under_its_own_layout_with_all_of_its_tolerance(
    events: list[dict[str, Any]], written: list[dict[str, Any]], is_steady: bool
) -> None:
    assert steady(events, written, layout="2x2x2", nodes=4, tolerate=2) == (NODES if is_steady else ())


def test_a_cell_must_have_had_its_loss_within_the_interval_and_every_sample_once() -> None:
    fine = [incident("node_loss", lost=2), incident("resize", lost=0)]
    assert wrong(fine, rows(1, 2, 3), since=10.0, every_steps=2) == ()
    assert wrong(fine, rows(1, 3), since=10.0, every_steps=2) == ("ledger: step 3 begins at sample 16, 8 was next",)
    assert wrong([incident("node_loss", lost=3)], rows(1), since=10.0, every_steps=2) == ("3 steps lost by node_loss, 2 allowed",)
    assert wrong([incident("node_loss", at=5.0)], rows(1), since=10.0, every_steps=2) == ("no incident of a lost node: none at all",)


def test_what_failed_is_done_again_and_stays_in_the_table() -> None:
    [first, second, *_] = every = cells("2x2x2", nodes=4, most=1)
    told = {"layout": "2x2x2", "back_s": 1.25, "steps_lost": 1}
    done = [{**told, "cell": str(first), "held": False}, {**told, "cell": str(second), "held": False}, {**told, "cell": str(first), "held": True}]
    assert left_to_do(every, done) == list(every[1:])
    text = table(done, ["2x2x2"], nodes=4, most=1)
    assert "### 2x2x2: 1 of 28 cells hold, 2 tries did not" in text
    assert text.count("1.2 s, 1 (1 failed)") == 1 and text.count("FAILED (1 failed)") == 1 and text.count("–") == 26
