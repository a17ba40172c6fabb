import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fault_tolerance.snapshots import moves as moves_module
from fault_tolerance.snapshots.moves import batches, moves_for, widen
from fault_tolerance.snapshots.restore import _window
from fault_tolerance.snapshots.slab import item_bytes
from tests.fault_tolerance.snapshots.test_slab import plan_of
from tests.fault_tolerance.snapshots.vaults import atlas_of, whole_state

LAYOUTS = ("1x1x1", "2x2x2", "4x1x2", "1x3x2", "2x1x4", "1x8x1", "2x3x1", "1x2x4", "1x4x1 flat", "1x3x1 groups")


def node_memory(plan, state):
    """The bytes of every node, as its ranks would stage them."""
    memory = {node: np.full(plan.node_bytes(node), 0xEE, np.uint8) for node in plan.nodes}
    for rank, node in enumerate(plan.seats):
        for entry in plan.slab(rank).entries:
            box, start = entry.piece.box, plan.base_of(rank) + entry.offset
            data = np.ascontiguousarray(state[entry.piece.tensor][tuple(map(slice, box.start, box.stop))])
            memory[node][start : start + entry.nbytes] = data.reshape(-1).view(np.uint8)
    return memory


@given(
    old=st.sampled_from(LAYOUTS),
    new=st.sampled_from(LAYOUTS),
    nodes=st.integers(1, 6),
    chunk=st.sampled_from([64, 192, 4096, 1 << 20]),
    batch=st.sampled_from([4000, 1 << 25]),
)
@settings(max_examples=settings.default.max_examples // 5)
def test_moving_equals_slicing_for_any_two_layouts(old, new, nodes, chunk, batch):
    plan, atlas = plan_of(old, nodes, tolerate=nodes // 2, chunk_bytes=chunk), atlas_of(new)
    state = whole_state(atlas, 5)
    memory = node_memory(plan, state)
    moves_module.MOVE_BYTES, moves_module.BATCH_BYTES, kept = batch, batch, (moves_module.MOVE_BYTES, moves_module.BATCH_BYTES)
    try:
        for rank in range(atlas.layout.world):
            wanted = atlas.held(rank)
            out = {(piece.tensor, piece.box): np.full(piece.box.shape, 0xABCD, np.uint32) for piece in wanted}
            for batch_of in batches(plan, moves_for(plan, atlas, rank)):
                assert all(a[1] < b[0] for a, b in zip(batch_of.ranges, batch_of.ranges[1:], strict=False))
                for move in batch_of.moves:
                    first = max(low for low, _ in batch_of.ranges if low <= move.first)
                    last = next(high for low, high in batch_of.ranges if low == first)
                    assert last >= move.last
                    window = _window(move, memory[batch_of.node][first:last], first, item_bytes(move.dtype))
                    out[move.tensor, move.target][move.overlap.within(move.target)] = window
            for piece in wanted:
                expected = state[piece.tensor][tuple(map(slice, piece.box.start, piece.box.stop))]
                assert np.array_equal(out[piece.tensor, piece.box], expected.view(np.uint32))
    finally:
        moves_module.MOVE_BYTES, moves_module.BATCH_BYTES = kept


def test_ranges_end_where_chunks_do_and_never_beyond_the_node():
    plan = plan_of("2x2x2", 3, chunk_bytes=192)
    node = plan.nodes[0]
    for first in range(0, plan.node_bytes(node) - 1, 777):
        low, high = widen(plan, node, first, first + 1)
        assert low <= first < high <= plan.node_bytes(node)
        block = plan.block_bytes(node)
        assert low % block % 192 == 0
        assert high % block % 192 == 0 or high % block == 0 or high == plan.node_bytes(node)


def test_a_snapshot_of_another_model_is_refused():
    plan, other = plan_of("2x2x2", 2), atlas_of("1x1x1", width=32)
    with pytest.raises(ValueError, match="same model"):
        moves_for(plan, other, 0)


def test_nothing_moves_that_is_not_wanted():
    plan = plan_of("2x2x2", 4)
    wanted = plan.atlas.held(5)
    assert sum(move.nbytes for move in moves_for(plan, plan.atlas, 5)) == sum(4 * piece.box.size for piece in wanted)
