"""What a node holds of what ranks need, against counting element by element."""

from __future__ import annotations

import numpy as np
import pytest

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from framework.planning.overlap import Overlap
from parallel.layout import Layout
from tests.fault_tolerance.snapshots.vaults import atlas_of

NODES = ("n0", "n1")


def counted(plan: SnapshotPlan, layout: str, node: str, rank: int) -> int:
    """Mark every element that the node keeps, then count those that the rank needs."""
    marks = {spec.name: np.zeros(spec.shape, bool) for spec in plan.atlas.specs}
    for owner in plan.ranks_on(node):
        for entry in plan.slab(owner).entries:
            marks[entry.piece.tensor][tuple(map(slice, entry.piece.box.start, entry.piece.box.stop))] = True
    held = atlas_of(layout).held(rank)
    return 4 * sum(int(marks[p.tensor][tuple(map(slice, p.box.start, p.box.stop))].sum()) for p in held)


@pytest.mark.parametrize("layout", ["1x1x1", "2x1x1", "1x3x1", "1x1x2", "2x2x1"])
def test_bytes_in_place_are_those_that_are_counted(layout: str) -> None:
    atlas = atlas_of("2x2x1")
    plan = SnapshotPlan(
        run="r",
        generation=1,
        atlas=atlas,
        seats=("n0", "n0", "n1", "n1"),
        groups=plan_groups(dict.fromkeys(NODES), tolerate=1, group_size=2),
        addresses=dict.fromkeys(NODES, "x"),
    )
    overlap, degrees = Overlap(plan, NODES, lambda wanted: atlas_of(str(wanted))), Layout.parse(layout)
    for node in NODES:
        for rank in range(degrees.world):
            assert overlap(degrees, node, range(rank, rank + 1)) == counted(plan, layout, node, rank)
    assert overlap(degrees, "elsewhere", range(degrees.world)) == 0
    needed = sum(4 * piece.box.size for rank in range(degrees.world) for piece in atlas_of(layout).held(rank))
    assert overlap.needed(degrees) == needed
