"""The decoder on one device: its shapes, its causality, a slice of its heads, its numbers; and its first weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framework.model import Attention, Decoder, flops_per_token, num_params, rope_table, rotate
from framework.training.initial import BAND_ELEMENTS, InitialWeights, default_rule, initial_box
from parallel.assemble import materialise, meta, prune, tie_again
from parallel.boxes import Box
from parallel.contract import check_model
from parallel.specs import ties

SMALL = {"vocab_size": 50, "num_layers": 3, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}


def model(**changes: object) -> Decoder:
    """A small decoder with the first weights of seed 0."""
    made = Decoder(**(SMALL | changes))  # type: ignore[arg-type]
    weights = InitialWeights(made, seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights(name, tuple(parameter.shape), Box.whole(parameter.shape)))
    return made


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def test_tokens_go_in_and_logits_come_out() -> None:
    assert model()(tokens()).shape == (2, 16, 50)


def test_no_position_sees_a_later_one() -> None:
    one = tokens()
    other = one.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 50
    before, after = model()(one), model()(other)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_first_loss_is_that_of_a_guess() -> None:
    logits = model()(tokens(8, 64))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(8, 64).flatten())
    assert float(loss.detach()) == pytest.approx(math.log(50), rel=0.02)


def test_rope_depends_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, 1, 8, generator=generator), torch.randn(1, 1, 1, 8, generator=generator)
    cos, sin = rope_table(20, 8, 10000.0, torch.device("cpu"))
    q_T, k_T = rotate(q.expand(1, 20, 1, 8), cos, sin), rotate(k.expand(1, 20, 1, 8), cos, sin)
    scores = torch.einsum("btke,bske->ts", q_T, k_T)
    for distance in range(4):
        torch.testing.assert_close(
            scores.diagonal(distance), scores[0, distance].expand(20 - distance), atol=1e-5, rtol=1e-5
        )


def test_attention_is_the_sum_over_slices_of_its_heads() -> None:
    """What tensor parallelism relies on: half the query heads with their key heads give half of the output's sum."""
    whole = Attention(dim=32, num_heads=4, num_kv_heads=2, rope_theta=10000.0)
    x_BTD = torch.randn(2, 8, 32)
    parts = []
    for half in range(2):
        part = Attention(dim=32, num_heads=4, num_kv_heads=2, rope_theta=10000.0)
        for name in ("wq", "wk", "wv"):
            getattr(part, name).weight = nn.Parameter(getattr(whole, name).weight.chunk(2)[half])
        part.wo.weight = nn.Parameter(whole.wo.weight.chunk(2, dim=1)[half])
        parts.append(part(x_BTD))
    torch.testing.assert_close(parts[0] + parts[1], whole(x_BTD))


@pytest.mark.parametrize("tie", [False, True])
def test_stages_in_a_row_are_the_whole(tie: bool) -> None:
    whole = model(tie_embeddings=tie)
    x = tokens()
    for units in ({0, 1}, {2}, {3, 4}):
        stage = model(tie_embeddings=tie)
        prune(stage, frozenset(units))
        x = stage(x)
    torch.testing.assert_close(x, whole(tokens()))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.dim 30 does not divide by model\.num_heads 4"):
        Decoder(**(SMALL | {"dim": 30}))
    with pytest.raises(ValueError, match=r"must be even for RoPE, got 9"):
        Decoder(**(SMALL | {"dim": 36}))
    with pytest.raises(ValueError, match=r"model\.num_heads 4 does not divide by model\.num_kv_heads 3"):
        Decoder(**(SMALL | {"num_kv_heads": 3}))


def test_parameters_are_counted_once() -> None:
    free, tied = (
        num_params(meta(lambda: Decoder(**SMALL))),
        num_params(meta(lambda: Decoder(**SMALL, tie_embeddings=True))),
    )
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert free == 3 * layer + 2 * 50 * 32 + 32
    assert free - tied == 50 * 32


def test_flops_count_matrices_and_attention_but_not_the_lookup() -> None:
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    expected = 6 * (3 * layer + 50 * 32) + 6 * 3 * 32 * 128
    for tie in (False, True):
        assert flops_per_token(meta(lambda tie=tie: Decoder(**SMALL, tie_embeddings=tie)), seq_len=128) == expected


@given(st.integers(0, 2**40), st.data())
@settings(max_examples=settings.default.max_examples // 4)
def test_any_box_of_a_first_weight_is_cut_from_the_same_whole(seed: int, data: st.DataObject) -> None:
    shape = (7, 400_000)  # several rows to a band, several bands
    start = data.draw(st.integers(0, 7))
    stop = data.draw(st.integers(start, 7))
    low = data.draw(st.integers(0, 400_000))
    high = data.draw(st.integers(low, min(400_000, low + 50)))
    box = Box((start, low), (stop, high))
    whole = initial_box(seed=seed % 3, name="w", shape=shape, box=Box.whole(shape), mean=0.5, std=0.1)
    part = initial_box(seed=seed % 3, name="w", shape=shape, box=box, mean=0.5, std=0.1)
    assert torch.equal(part, whole[start:stop, low:high])
    assert math.prod(shape) > 2 * BAND_ELEMENTS


def test_first_weights_depend_on_seed_and_name() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return initial_box(seed=seed, name=name, shape=(64, 64), box=Box.whole((64, 64)), mean=0.0, std=0.02)

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert float(draw(0, "a").std()) == pytest.approx(0.02, rel=0.05)


def test_norms_start_at_one_and_residual_outputs_small() -> None:
    made = model()
    assert made.norm is not None
    assert torch.equal(made.norm.weight, torch.ones(32))
    block = made.layers["0"]
    assert float(block.get_parameter("ffn.down.weight").std()) == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert default_rule("x.bias", 1) == (0.0, 0.0)
    assert default_rule("norm.weight", 1) == (1.0, 0.0)


def test_a_tie_survives_materialisation() -> None:
    made = meta(lambda: Decoder(**SMALL, tie_embeddings=True))
    materialise(made, torch.device("cpu"))
    assert isinstance(made, Decoder)
    assert made.head is not None
    assert made.embed is not None
    assert made.head.weight is made.embed.weight
    made.head.weight = nn.Parameter(torch.zeros(50, 32))
    tie_again(made, ties(meta(lambda: Decoder(**SMALL, tie_embeddings=True))))
    assert made.head.weight is made.embed.weight


class Broken(nn.Module):
    """Not a model."""

    dim = 4

    def __init__(self, layers: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.layers = layers
        self.norm = None
        self.head = nn.Linear(4, 3)


def test_what_breaks_the_contract_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"model Linear: must have embed, layers, norm, head and dim, got none of embed"
    ):
        check_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model Broken: layers must be an nn\.ModuleDict with keys .* got ModuleList"):
        check_model(Broken(nn.ModuleList()))
    with pytest.raises(ValueError, match=r"layout\.tp: must be 1 for model Broken, which has no tp_plan\(\), got 2"):
        check_model(Broken(nn.ModuleDict({"0": nn.Linear(4, 4)})), tp=2)
    stray = Broken(nn.ModuleDict({"0": nn.Linear(4, 4)}))
    stray.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"parameters must belong to embed, .*, got some under gain"):
        check_model(stray)
    buffered = Broken(nn.ModuleDict({"0": nn.BatchNorm1d(4)}))
    with pytest.raises(ValueError, match=r"has buffers, so it must have reset_buffers\(\)"):
        check_model(buffered)
