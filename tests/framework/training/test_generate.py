"""Text generation: seeded, inside the trained length, never a padding id."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from framework.data.samples import build
from framework.data.windows import Data
from framework.model import Decoder
from framework.training.generate import continuation, generate


class Counting(nn.Module):
    """Says that token t is followed by t + 1, mostly, and remembers how long its contexts were."""

    def __init__(self, vocab_size: int, sharpness: float = 50.0) -> None:
        super().__init__()
        self.vocab_size, self.sharpness, self.lengths = vocab_size, sharpness, list[int]()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.lengths.append(tokens_BT.shape[1])
        return self.sharpness * nn.functional.one_hot((tokens_BT + 1) % self.vocab_size, self.vocab_size).float()


@pytest.fixture
def data() -> Data:
    return build({"kind": "synthetic", "seq_len": 8, "num_samples": 100}, seed=0)


def drawn(model: nn.Module, count: int, *, temperature: float = 0.0, seed: int = 0, vocab_size: int = 256) -> list[int]:
    found = continuation(model, [65], vocab_size=vocab_size, seq_len=8, temperature=temperature, seed=seed)
    return list(islice(found, count))


def test_the_model_is_followed_and_its_context_stays_within_the_trained_length(data: Data) -> None:
    model = Counting(256)
    assert generate(model, data, prompt="A", num_tokens=12, seq_len=8, temperature=0.0) == "BCDEFGHIJKLM"
    assert model.lengths == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]


def test_the_seed_decides() -> None:
    model = Counting(256, sharpness=2.0)
    assert drawn(model, 30, temperature=1.0, seed=1) == drawn(model, 30, temperature=1.0, seed=1)
    assert drawn(model, 30, temperature=1.0, seed=1) != drawn(model, 30, temperature=1.0, seed=2)


def test_temperature_sharpens() -> None:
    model = Counting(256, sharpness=4.0)
    expected = list(range(66, 96))
    right = [
        sum(a == b + 1 for a, b in zip(x[1:], x, strict=False))
        for x in (drawn(model, 99, temperature=t) for t in (0.3, 2.0))
    ]
    assert drawn(model, 30) == expected and right[0] > 90 and right[1] < 30
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        drawn(model, 1, temperature=-1.0)


def test_padding_ids_are_never_drawn() -> None:
    assert max(drawn(Counting(256), 300, temperature=3.0, vocab_size=100)) < 100
    assert max(drawn(Counting(256), 300, vocab_size=100)) < 100


def test_a_real_model_writes_text_from_an_empty_prompt(data: Data) -> None:
    torch.manual_seed(0)
    model = Decoder(vocab_size=256, num_layers=1, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=16)
    text = generate(model, data, prompt="", num_tokens=20, seq_len=8)
    assert text and text == generate(model, data, prompt="", num_tokens=20, seq_len=8)
