"""The law gives the published numbers, and a run's advice follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from framework.model import Decoder
from framework.training.step_law import (
    advise,
    batch_tokens,
    non_embedding_params,
    peak_lr,
    round_batch,
    tokens_of_steps,
    warnings,
)

BILLION = 10**9


@pytest.mark.parametrize(
    ("num_params", "num_tokens", "lr", "batch"),
    [(BILLION, 1e11, 1.63e-3, 1.11e6), (7 * BILLION, 1.4e12, 9.2e-4, 5.0e6)],
)
def test_the_published_examples(num_params: int, num_tokens: float, lr: float, batch: float) -> None:
    assert peak_lr(num_params=num_params, num_tokens=num_tokens) == pytest.approx(lr, rel=0.005)
    assert batch_tokens(num_tokens) == pytest.approx(batch, rel=0.005)


@given(st.integers(1, 10**7))
def test_the_tokens_of_a_number_of_steps_are_those_of_its_batches(num_steps: int) -> None:
    num_tokens = tokens_of_steps(num_steps)
    assert num_steps * batch_tokens(num_tokens) == pytest.approx(num_tokens, rel=1e-9)


def test_advice_for_a_run_of_given_length() -> None:
    advice = advise(num_params=7 * BILLION, seq_len=4096, num_steps=300_000)
    num_tokens = 300_000 * 4096 * advice.global_batch
    assert advice.global_batch * 4096 == pytest.approx(batch_tokens(num_tokens), rel=0.2)
    assert advice.lr == pytest.approx(peak_lr(num_params=7 * BILLION, num_tokens=num_tokens), rel=0.01)
    assert advice.lr * advice.final_lr_ratio == pytest.approx(1e-5) and advice.warmup_steps == 2000
    assert f"lr {advice.lr:g}" in advice.reason and f"{advice.global_batch} samples" in advice.reason


def test_a_given_batch_is_kept() -> None:
    advice = advise(num_params=BILLION, seq_len=2048, num_steps=1000, global_batch=7)
    assert advice.global_batch == 7 and "as given (the law has" in advice.reason and advice.warmup_steps == 100
    assert advice.lr == pytest.approx(peak_lr(num_params=BILLION, num_tokens=7 * 2048 * 1000), rel=0.01)


@given(st.floats(0.01, 1e6))
def test_batches_are_rounded_to_what_most_layouts_divide(samples: float) -> None:
    rounded = round_batch(samples)
    assert rounded == 1 or bin(rounded).strip("0b") in ("1", "11")
    assert samples < 1 or 0.7 < rounded / samples < 1.42


def test_what_is_far_off_is_warned_of() -> None:
    run = {"num_params": BILLION, "seq_len": 2048, "num_steps": 100_000}
    good = advise(**run)
    assert warnings(lr=good.lr, global_batch=good.global_batch, **run) == ()
    (line,) = warnings(lr=good.lr * 4.5, global_batch=good.global_batch, **run)
    assert line.startswith("optim.lr: should be within 4x of ") and line.endswith("try optim=step_law")
    small = warnings(lr=good.lr, global_batch=max(1, good.global_batch // 100), **run)
    assert any("optim.global_batch" in line for line in small)
    assert warnings(lr=1.0, global_batch=1, num_params=10**6, seq_len=64, num_steps=9) == (), "far outside of the law"


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="step_law: .* got 5, 6 and 0; set optim.num_steps"):
        advise(num_params=5, seq_len=6, num_steps=0)


def test_embeddings_are_not_counted() -> None:
    shape = {"num_layers": 3, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
    model = Decoder(vocab_size=100, **shape)
    tables = sum(p.numel() for p in (model.embed.weight, model.head.weight))  # type: ignore[union-attr,misc,arg-type]
    assert isinstance(model, nn.Module)
    assert non_embedding_params(**shape) == sum(p.numel() for p in model.parameters()) - tables
