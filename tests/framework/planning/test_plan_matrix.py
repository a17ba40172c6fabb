"""What is planned after every loss: four layouts on four nodes of two workers, each single node and each pair gone.

The seats are compared with all permutations of nodes, the scored layouts with all that the model admits.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations

import pytest

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from framework.config import Config, decode
from framework.control.incident import Trouble
from framework.plan import Place, Plan, Source, expected_s, make_plan
from framework.planning.overlap import Overlap
from framework.planning.planner import Planner
from parallel.layout import Layout
from tests.framework.composed import composed

NODES = ("n0", "n1", "n2", "n3")
LAYOUTS = ("2x2x2", "1x4x2", "2x4x1", "4x2x1")
LOSSES = [lost for count in (1, 2) for lost in combinations(NODES, count)]
QUICK = (("n2",), ("n0", "n3"))


@cache
def config(layout: str) -> Config:
    pp, dp, tp = layout.split("x")
    words = ["model=tiny", "data=synthetic", "optim.global_batch=8", "cluster.workers_per_node=2", "fault_tolerance.tolerate=2"]
    return decode(composed(*words, f"layout.pp={pp}", f"layout.dp={dp}", f"layout.tp={tp}", run_dir="none"))


def places(nodes: tuple[str, ...]) -> tuple[Place, ...]:
    return tuple(Place(node, 2, node, warm=2) for node in nodes)


def replanned(layout: str, lost: tuple[str, ...]) -> tuple[Planner, Plan, Overlap]:
    """The plan of the survivors, and what they hold of the snapshot that the first plan took."""
    planner = Planner(config(layout))
    before = make_plan("r", planner.wish(), planner.situation(places(NODES), source=Source("fresh", 0), generation=0))
    kept = SnapshotPlan(
        run="r",
        generation=1,
        atlas=planner.atlas(before.layout, before.schedule),
        seats=before.node_of_rank,
        groups=plan_groups(dict(before.domains), tolerate=2, group_size=4),
        addresses=dict.fromkeys(NODES, "127.0.0.1:1"),
    )
    left = tuple(node for node in NODES if node not in lost)
    overlap = Overlap(kept, left, lambda degrees: planner.atlas(degrees, before.schedule))
    trouble = Trouble("node_loss", (), lost, f"{', '.join(lost)} gone", 6, 0.0)
    situation = planner.situation(places(left), source=Source("memory", 6), generation=1, overlap=overlap, trouble=trouble)
    return planner, make_plan("r", planner.wish(), situation), overlap


@pytest.mark.parametrize("lost", [pytest.param(lost, id="-".join(lost), marks=[pytest.mark.slow] * (lost not in QUICK)) for lost in LOSSES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_loss_all_that_is_left_is_weighed_and_the_fewest_bytes_move(layout: str, lost: tuple[str, ...]) -> None:
    planner, plan, overlap = replanned(layout, lost)
    left = [node for node in NODES if node not in lost]
    assert set(plan.nodes) <= set(left) and plan.layout.world <= 2 * len(left)

    scored = {option.layout for option in plan.options}
    assert scored == set(planner.candidates(2 * len(left))), "every admissible layout has a score"
    assert {Layout(1, 1, 1), Layout(2, 1, 2), Layout(4, 1, 1), Layout(1, 1, 4)} <= scored
    fastest = min(expected_s(option.layout, planner.wish(), situation_of(planner)) for option in plan.options)
    assert next(o.step_s for o in plan.options if o.layout == plan.layout) == fastest

    blocks = [range(plan.ranks_on(node)[0], plan.ranks_on(node)[-1] + 1) for node in plan.nodes]
    in_place = sum(overlap(plan.layout, node, ranks) for node, ranks in zip(plan.nodes, blocks, strict=True))
    best = max(
        sum(overlap(plan.layout, node, ranks) for node, ranks in zip(order, blocks, strict=True))
        for order in permutations(left, len(blocks))
    )
    assert in_place == best, "no other seating keeps more bytes where they are"
    moved = next(option.moved_bytes for option in plan.options if option.layout == plan.layout)
    assert moved == overlap.needed(plan.layout) - in_place

    assert plan.tolerate == min(2, len(plan.nodes) - 1)
    wanted = (f"{', '.join(lost)} gone", f"layout {plan.layout} on", f"instead of {layout}", f"best of {len(scored)} ways", "step 6")
    assert all(words in plan.reason for words in wanted), plan.reason


def situation_of(planner: Planner):  # type: ignore[no-untyped-def]
    return planner.situation(places(NODES), source=Source("fresh", 0), generation=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_nodes_take_their_old_seats(layout: str) -> None:
    """A generation that ends with nobody lost: the worst seating would move the whole state."""
    _, plan, _ = replanned(layout, ())
    assert str(plan.layout) == layout
    assert plan.node_of_rank == tuple(node for node in NODES for _ in range(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spare_takes_the_seat_of_the_lost_and_nobody_else_moves(layout: str) -> None:
    planner, _, overlap = replanned(layout, ("n2",))
    five = (*places(("n0", "n1", "n3")), Place("n4", 2, "n4", warm=2))
    situation = planner.situation(five, source=Source("memory", 6), generation=1, overlap=overlap)
    plan = make_plan("r", planner.wish(), situation)
    assert str(plan.layout) == layout
    assert plan.node_of_rank == tuple(node for node in ("n0", "n1", "n4", "n3") for _ in range(2))
