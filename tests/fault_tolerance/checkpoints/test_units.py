"""Bands and units tile what they cut, and end where other layouts cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.checkpoints.index import Index, ShardEntry
from fault_tolerance.checkpoints.reads import needed_bytes, plan_reads
from fault_tolerance.checkpoints.shard import _plan
from fault_tolerance.checkpoints.units import MAX_UNIT_BYTES, cut
from parallel.atlas import Atlas, TensorSpec
from parallel.boxes import Box
from tests.fault_tolerance.checkpoints.saving import atlas_of, decoder_specs


@given(
    st.lists(st.integers(1, 40), min_size=0, max_size=3),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from(["float32", "bfloat16", "uint8"]),
)
def test_bands_tile_the_piece_and_units_tile_the_band(shape: list[int], tp_dim: int | None, dtype: str) -> None:
    tp_dim = tp_dim if tp_dim is not None and tp_dim < len(shape) else None
    spec = TensorSpec("x", tuple(shape), dtype, tp_dim, (0,))
    box = Box.whole(spec.shape)
    counts = np.zeros(shape, int)
    lie, width = cut(spec, box), {"float32": 4, "bfloat16": 2, "uint8": 1}[dtype]
    assert lie.offsets[0] == 0 and (np.diff(lie.offsets) > 0).all() and lie.num_units == len(lie.offsets) - 1
    for number, band in enumerate(lie.bands):
        counts[band.within(box)] += 1
        assert lie.starts[number + 1] - lie.starts[number] == band.size * width
        assert lie.offsets[lie.firsts[number]] == lie.starts[number], "a band begins with a unit"
    assert (counts == 1).all()


def test_a_band_ends_where_tp_would_cut_and_a_unit_where_dp_would() -> None:
    spec = TensorSpec("w2", (768, 2048), "float32", 1, (0,))
    stops = {band.stop[1] for band in cut(spec, Box.whole(spec.shape)).bands}
    assert {683, 1366, 512, 1024, 1536, 2048} <= stops
    offsets = set((cut(spec, Box((0, 0), (768, 128))).offsets // (128 * 4)).tolist())
    assert {256, 512, 154, 308, 110} <= offsets  # a third, two thirds, one and two fifths, a seventh


def test_a_huge_tensor_has_large_units_and_a_norm_has_one() -> None:
    head = TensorSpec("head", (128_256, 8192), "float32", 0, (0,))
    assert np.diff(cut(head, Box.whole(head.shape)).offsets).max() <= MAX_UNIT_BYTES
    norm = TensorSpec("norm", (384,), "float32", None, (0,))
    assert cut(norm, Box.whole(norm.shape)).num_units == 1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["1x1x1", "2x2x2", "1x3x2", "1x7x1"])
def test_the_20m_preset_reads_within_one_percent_of_what_it_needs(source: str) -> None:
    specs = decoder_specs(dim=384, kv_dim=192, ffn_dim=1024, vocab=259, layers=12)
    index = _index(atlas_of(specs, source, layers=12))
    for layout in ["1x1x1", "2x2x2", "1x5x1", "3x2x1", "1x7x1", "1x2x4", "2x3x1"]:
        target = atlas_of(specs, layout, layers=12)
        read = needed = 0
        for rank in range(target.layout.world):
            reads = plan_reads(index, target.held(rank))
            read += sum(r.fit.num_bytes + 8 * r.fit.num_hashes for r in reads)
            needed += needed_bytes(index, target.held(rank))
        assert read <= 1.01 * needed, layout


def _index(atlas: Atlas) -> Index:
    plans = [_plan(atlas.owned(rank), atlas.specs) for rank in range(atlas.layout.world)]
    shards = (ShardEntry(f"r{i}", 0, p.data_bytes, p.num_hashes, "", p.extents) for i, p in enumerate(plans))
    return Index(atlas.specs, tuple(shards), {})
