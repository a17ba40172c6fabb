"""The atlas by itself: owned pieces tile the state once, held ones as often as it is replicated.

That it is what DTensor really holds is tested in `test_engine_layouts.py`, against DTensor.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.model import Decoder
from parallel.assemble import meta
from parallel.atlas import STATE_KINDS, Atlas, TensorSpec
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
    return Atlas(cut, draw(LAYOUTS), draw(st.sampled_from(SCHEDULES)), num_layers)


def counts(atlas: Atlas, pieces: str) -> dict[str, np.ndarray]:
    """How often each element is held, or owned, by looking."""
    found = {spec.name: np.zeros(spec.shape, int) for spec in atlas.specs}
    for rank in range(atlas.layout.world):
        for piece in getattr(atlas, pieces)(rank):
            shape = atlas.by_name[piece.tensor].shape
            found[piece.tensor][piece.box.within(Box.whole(shape))] += 1
    return found


@given(atlases())
@settings(max_examples=60, deadline=None)
def test_owned_pieces_tile_the_state_once(atlas: Atlas) -> None:
    assert all((count == 1).all() for count in counts(atlas, "owned").values())


@given(atlases())
@settings(max_examples=60, deadline=None)
def test_held_pieces_cover_the_state_as_often_as_it_is_replicated(atlas: Atlas) -> None:
    for name, count in counts(atlas, "held").items():
        spec = atlas.by_name[name]
        stages = sum(not atlas.units(p).isdisjoint(spec.units) for p in range(atlas.layout.pp))
        times = stages * (1 if spec.tp_dim is not None else atlas.layout.tp) * (1 if spec.shape else atlas.layout.dp)
        assert (count == times).all()


@given(atlases())
@settings(max_examples=60, deadline=None)
def test_owned_lies_within_held(atlas: Atlas) -> None:
    for rank in range(atlas.layout.world):
        held = {piece.tensor: piece.box for piece in atlas.held(rank)}
        assert all(piece.box.intersect(held[piece.tensor]) == piece.box for piece in atlas.owned(rank))


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
