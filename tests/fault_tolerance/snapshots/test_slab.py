import pytest

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.slab import ALIGN, slab_of
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from tests.fault_tolerance.snapshots.vaults import atlas_of

LAYOUTS = ("1x1x1", "2x2x2", "4x1x1", "1x3x2", "2x1x4")


def plan_of(layout: str, num_nodes: int, tolerate: int = 1, **options) -> SnapshotPlan:
    atlas = atlas_of(layout)
    names = [f"n{i}" for i in range(num_nodes)]
    seats = tuple(names[rank * num_nodes // atlas.layout.world] for rank in range(atlas.layout.world))
    groups = plan_groups(dict.fromkeys(names), tolerate=tolerate, group_size=num_nodes)
    return SnapshotPlan(
        run="r", generation=3, atlas=atlas, seats=seats, groups=groups, addresses=dict.fromkeys(names, "h:1"), **options
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slabs_hold_every_element_once_aligned_and_apart(layout):
    atlas = atlas_of(layout)
    slabs = [slab_of(atlas, rank) for rank in range(atlas.layout.world)]
    elements = sum(entry.nbytes // 4 for slab in slabs for entry in slab.entries)
    shapes = [spec.shape for spec in atlas.specs]
    assert elements == sum(_size(shape) for shape in shapes)
    for slab in slabs:
        ends = [0, *(entry.offset + entry.nbytes for entry in slab.entries)]
        assert all(entry.offset % ALIGN == 0 for entry in slab.entries)
        assert all(end <= entry.offset for end, entry in zip(ends, slab.entries, strict=False))
        assert ends[-1] <= slab.nbytes


def test_an_unknown_dtype_is_refused():
    from dataclasses import replace

    atlas = atlas_of("1x1x1")
    strange = replace(atlas, specs=(replace(atlas.specs[0], dtype="float31"),))
    with pytest.raises(ValueError, match="float31"):
        slab_of(strange, 0)


@pytest.mark.parametrize(("nodes", "tolerate"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (7, 2)])
def test_the_blocks_of_a_node_cover_its_bytes_and_no_more(nodes, tolerate):
    plan = plan_of("2x2x2", nodes, tolerate)
    for node in plan.nodes:
        k = plan.group_of(node).k
        assert sum(plan.real_bytes(node, block) for block in range(k)) == plan.node_bytes(node)
        assert plan.block_bytes(node) * k >= plan.node_bytes(node)


def test_ranks_follow_each_other_in_their_nodes_bytes():
    plan = plan_of("2x2x2", 3)
    for node in plan.nodes:
        at = 0
        for rank in plan.ranks_on(node):
            assert plan.base_of(rank) == at
            at += plan.slab(rank).nbytes
        assert at == plan.node_bytes(node)


def test_a_plan_goes_through_json_unchanged():
    plan = plan_of("2x2x2", 4, 2, base=(2, 40), max_rate_bytes_s=1e6, scrub_bytes_s=5.0, chunk_bytes=8192)
    again = SnapshotPlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.fingerprint != plan_of("2x2x2", 4, 1).fingerprint
    with pytest.raises(ValueError, match="snapshot plan"):
        SnapshotPlan.from_json({"run": "r"})


def test_a_plan_that_makes_no_sense_is_refused():
    plan = plan_of("2x2x2", 4).to_json()
    for change, word in [
        ({"seats": ["n0"]}, "seats"),
        ({"seats": ["x"] * 8}, "group"),
        ({"addresses": {}}, "address"),
        ({"chunk_bytes": 100}, "64"),
    ]:
        with pytest.raises(ValueError, match=word):
            SnapshotPlan.from_json(plan | change)


def _size(shape):
    size = 1
    for extent in shape:
        size *= extent
    return size
