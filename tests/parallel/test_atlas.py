"""The atlas by itself: owned pieces tile the state once, held ones as often as it is replicated.

That it is what DTensor really holds is tested in `test_engine_layouts.py`, against DTensor.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.model import Decoder
from parallel.assemble import meta
from parallel.atlas import SHARDINGS, STATE_KINDS, Atlas, TensorSpec
from parallel.boxes import Box
from parallel.layout import Layout
from parallel.specs import state_specs
from parallel.stages import SCHEDULES

LAYOUTS = st.builds(Layout, st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))


@st.composite
def atlases(draw: st.DrawFn) -> Atlas:
    num_layers = 6
    specs = [
        TensorSpec(
            name=f"param/{i}",
            shape=tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))),
            dtype="float32",
            tp_dim=None,
            units=tuple(sorted(draw(st.sets(st.integers(0, num_layers + 1), min_size=1, max_size=2)))),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    cut = tuple(
        TensorSpec(s.name, s.shape, s.dtype, draw(st.sampled_from([None, *range(len(s.shape))])), s.units)
        for s in specs
    )
    layout, sharding = draw(LAYOUTS), draw(st.sampled_from(SHARDINGS))
    if sharding != "rows":
        layout = Layout(dp=layout.dp)
        frozen = [draw(st.booleans()) for _ in cut]
        cut = tuple(replace(spec, frozen=is_frozen) for spec, is_frozen in zip(cut, frozen, strict=True))
    return Atlas(cut, layout, draw(st.sampled_from(SCHEDULES)), num_layers, sharding)


def counts(atlas: Atlas, pieces: str) -> dict[str, np.ndarray]:
    """How often each element is held, or owned, by looking."""
    found = {spec.name: np.zeros(spec.shape, int) for spec in atlas.specs}
    for rank in range(atlas.layout.world):
        for piece in getattr(atlas, pieces)(rank):
            shape = atlas.by_name[piece.tensor].shape
            found[piece.tensor][piece.box.within(Box.whole(shape))] += 1
    return found


@given(atlases())
def test_owned_pieces_tile_the_state_once(atlas: Atlas) -> None:
    assert all((count == 1).all() for count in counts(atlas, "owned").values())


@given(atlases())
def test_held_pieces_cover_the_state_as_often_as_it_is_replicated(atlas: Atlas) -> None:
    for name, count in counts(atlas, "held").items():
        spec = atlas.by_name[name]
        stages = sum(not atlas.units(p).isdisjoint(spec.units) for p in range(atlas.layout.pp))
        replicas = 1 if spec.shape or atlas.sharding != "rows" else atlas.layout.dp
        times = stages * (1 if spec.tp_dim is not None else atlas.layout.tp) * replicas
        assert (count == times).all()


@given(atlases())
def test_owned_lies_within_held(atlas: Atlas) -> None:
    for rank in range(atlas.layout.world):
        held = set(atlas.held(rank))
        assert all(home in held and piece.tensor == home.tensor for piece, home in atlas.shares(rank))
        assert all(piece.box.intersect(home.box) == piece.box for piece, home in atlas.shares(rank))


@given(atlases())
def test_pieces_of_zero_lie_end_to_end_in_flat_memory(atlas: Atlas) -> None:
    """So that an engine can give each as a view of it."""
    if atlas.sharding == "rows":
        return
    for rank in range(atlas.layout.world):
        ends: dict[str, int] = {}
        for piece in atlas.held(rank):
            shape = atlas.by_name[piece.tensor].shape
            flat = np.arange(math.prod(shape)).reshape(shape)[piece.box.within(Box.whole(shape))].ravel()
            start = ends.get(piece.tensor, atlas.flats[piece.tensor].range_of(rank)[0])
            assert flat.tolist() == list(range(start, start + flat.size))
            ends[piece.tensor] = start + flat.size
        assert all(end == atlas.flats[name].range_of(rank)[1] for name, end in ends.items())


def test_zero_cuts_a_group_where_the_drawing_says() -> None:
    """Decayed: a (2x3) and c (5) x 1 = 11 elements over 2 ranks, 6 each: the cut goes through c after no element."""
    specs = tuple(TensorSpec(f"param/{n}", s, "float32", None, (0,)) for n, s in [("a", (2, 3)), ("b", (4,)), ("c", (5, 1))])
    grouped = Atlas(specs, Layout(dp=2), "1f1b", 1, "groups")
    assert [(p.tensor, p.box.start, p.box.stop) for p in grouped.held(0)] == [
        ("param/a", (0, 0), (2, 3)), ("param/b", (0,), (2,)),
    ]  # fmt: skip
    flat = Atlas(specs, Layout(dp=2), "1f1b", 1, "flat")
    assert [(p.tensor, p.box.start, p.box.stop) for p in flat.held(1)] == [
        ("param/a", (1, 0), (2, 3)), ("param/b", (2,), (4,)), ("param/c", (3, 0), (5, 1)),
    ]  # fmt: skip


def test_zero_has_no_pipeline_and_no_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match="sharding flat needs pp 1 and tp 1"):
        Atlas((), Layout(pp=2), "1f1b", 2, "flat")
    with pytest.raises(ValueError, match="must be one of rows, flat, groups"):
        Atlas((), Layout(), "1f1b", 2, "columns")


def test_specs_name_every_parameter_and_both_moments() -> None:
    model = meta(lambda: Decoder(vocab_size=9, num_layers=2, dim=8, num_heads=2, num_kv_heads=1, ffn_dim=12))
    specs = state_specs(model)
    names = [name for name, _ in model.named_parameters()]
    assert [spec.name for spec in specs] == [f"{kind}/{name}" for kind in STATE_KINDS for name in names]
    by_name = {spec.name: spec for spec in specs}
    assert by_name["param/embed.weight"].units == (0,)
    assert by_name["exp_avg/layers.1.attention.wo.weight"] == TensorSpec(
        "exp_avg/layers.1.attention.wo.weight", (8, 8), "float32", 1, (2,)
    )
    assert by_name["exp_avg_sq/norm.weight"].tp_dim is None
    assert by_name["param/head.weight"].units == (3,)


def test_a_tied_embedding_is_listed_once_with_both_its_places() -> None:
    model = meta(
        lambda: Decoder(vocab_size=9, num_layers=2, dim=8, num_heads=2, num_kv_heads=1, ffn_dim=12, tie_embeddings=True)
    )
    by_name = {spec.name: spec for spec in state_specs(model)}
    assert by_name["param/embed.weight"].units == (0, 3)
    assert "param/head.weight" not in by_name
