"""Tensor parallelism, the part that needs no processes: plans, and which heads a rank needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from framework.model import Decoder
from parallel.tensor import heads_of_rank, style_of, tp_dim


class Planned(nn.Module):
    """A module with a plan of its own."""

    def __init__(self, plan: dict[str, str]) -> None:
        super().__init__()
        self._plan = plan

    def tp_plan(self) -> dict[str, str]:
        return self._plan


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_query_head_meets_its_key_head(groups: int, group: int, tp: int) -> None:
    num_heads, num_kv_heads = groups * group, groups
    if num_heads % tp:
        return
    mine = num_heads // tp
    for rank in range(tp):
        heads = heads_of_rank(num_heads, num_kv_heads, tp=tp, rank=rank)
        assert mine % len(heads) == 0
        met = [head for head in heads for _ in range(mine // len(heads))]
        assert met == [query // group for query in range(rank * mine, (rank + 1) * mine)]


def test_tiny_under_tp_4_needs_one_head_a_rank() -> None:
    assert [heads_of_rank(4, 2, tp=4, rank=rank) for rank in range(4)] == [(0,), (0,), (1,), (1,)]


def test_a_star_stands_for_a_layer_and_not_for_a_dot() -> None:
    model = Planned({"layers.*.w": "column", "layers.*": "gather"})
    assert style_of(model, "layers.3.w") == "column"
    assert style_of(model, "layers.3") == "gather"
    assert style_of(model, "layers.3.other.w") is None


def test_biases_follow_their_outputs() -> None:
    model = Planned({"a": "column", "b": "row", "c": "head"})
    assert [tp_dim(model, f"{name}.bias") for name in "abc"] == [0, None, 0]
    assert [tp_dim(model, f"{name}.weight") for name in "abc"] == [0, 1, 0]


def test_an_unknown_style_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"tp_plan a: style must be one of embedding, norm.*got 'colum'"):
        style_of(Planned({"a": "colum"}), "a")


def test_our_own_plan_covers_every_matrix() -> None:
    model = Decoder(vocab_size=9, num_layers=1, dim=8, num_heads=2, num_kv_heads=1, ffn_dim=12)
    assert all((tp_dim(model, name) is None) == ("norm" in name) for name, _ in model.named_parameters())
