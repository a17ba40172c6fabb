"""Step Law: the learning rate and the batch that suit a model of N parameters trained on D tokens.

    lr = 1.79 N^-0.713 D^0.307            tokens per step = 0.58 D^0.571

N does not count embeddings. The law was fitted on dense and sparse models of 0.2 to 1 B parameters with AdamW
(0.9, 0.95), weight decay 0.1, 2,000 warm-up steps and a cosine down to a *fixed* last rate of 1e-5, which therefore
belongs to it. Its basin is flat: what it predicts is within 0.1% of the best loss found (0.3% at worst).

Rule of this file: numbers in, numbers and their reason out.
Source: Li et al., "Predictable Scale: Part I, Step Law" (2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LR_FACTOR, LR_PARAMS, LR_TOKENS = 1.79, -0.713, 0.307
BATCH_FACTOR, BATCH_TOKENS = 0.58, 0.571
FINAL_LR = 1e-5
WARMUP_STEPS = 2000
FAR = 4.0
LEAST_PARAMS = 20_000_000  # a tenth of the smallest model that the law was fitted on


def peak_lr(*, num_params: int, num_tokens: float) -> float:
    """The best peak learning rate for N non-embedding parameters and D tokens."""
    return LR_FACTOR * float(num_params) ** LR_PARAMS * num_tokens**LR_TOKENS


def batch_tokens(num_tokens: float) -> float:
    """The best number of tokens per step for D tokens; it does not depend on the model."""
    return BATCH_FACTOR * num_tokens**BATCH_TOKENS


def tokens_of_steps(num_steps: int) -> float:
    """The D at which the best batch takes `num_steps` steps: D = num_steps * batch_tokens(D), solved for D."""
    return (BATCH_FACTOR * num_steps) ** (1 / (1 - BATCH_TOKENS))


@dataclass(frozen=True, slots=True)
class Advice:
    """What the law says for a run, rounded, and why."""

    lr: float
    global_batch: int
    final_lr_ratio: float
    warmup_steps: int
    reason: str


def advise(*, num_params: int, seq_len: int, num_steps: int, global_batch: int | None = None) -> Advice:
    """The law for a run of `num_steps` steps. A given batch is kept, and D and the rate follow from it.

    A batch of its own choice is rounded to 2^k or 3 * 2^k samples, so that it splits over most layouts. The warm-up
    is the law's 2,000 steps, or a tenth of a shorter run.
    """
    if min(num_params, seq_len, num_steps) < 1:
        raise ValueError(
            "step_law: parameters, sequence length and steps must be at least 1, "
            f"got {num_params}, {seq_len} and {num_steps}; set optim.num_steps"
        )
    batch = round_batch(batch_tokens(tokens_of_steps(num_steps)) / seq_len) if global_batch is None else global_batch
    num_tokens = batch * seq_len * num_steps
    lr = float(f"{peak_lr(num_params=num_params, num_tokens=num_tokens):.2e}")
    best = batch_tokens(num_tokens) / seq_len
    kept = "" if global_batch is None else f", the batch as given (the law has {best:.3g})"
    reason = (
        f"step law for {num_params:,} parameters without embeddings and {num_tokens:,} tokens: lr {lr:g} falling to "
        f"{min(lr, FINAL_LR):g}, {batch} samples of {seq_len} tokens per step{kept}"
    )
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    return Advice(lr, batch, min(1.0, FINAL_LR / lr), warmup, reason)


def warnings(*, lr: float, global_batch: int, num_params: int, seq_len: int, num_steps: int) -> tuple[str, ...]:
    """A line for each of rate and batch that is more than 4 times off the law; none where it says nothing."""
    if num_params < LEAST_PARAMS:
        return ()
    tokens = global_batch * seq_len * num_steps
    pairs = (
        ("optim.lr", lr, peak_lr(num_params=num_params, num_tokens=tokens)),
        ("optim.global_batch", float(global_batch), max(1.0, batch_tokens(tokens) / seq_len)),
    )
    return tuple(
        f"{key}: should be within {FAR:g}x of {best:.3g}, which the step law has for {tokens:,} tokens, got {value:g}; "
        "try optim=step_law"
        for key, value, best in pairs
        if not 1 / FAR <= value / best <= FAR
    )


def round_batch(samples: float) -> int:
    """The nearest, in ratio, of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... ."""
    top = max(1, math.ceil(samples)).bit_length() + 1
    choices = [1, *(m << k for k in range(top + 1) for m in (2, 3))]
    return min(choices, key=lambda choice: abs(math.log(choice / max(1.0, samples))))


def non_embedding_params(*, num_layers: int, dim: int, num_heads: int, num_kv_heads: int, ffn_dim: int) -> int:
    """N of our decoder: attention, feed-forward and norms."""
    attention = dim * dim * 2 + dim * (dim // num_heads) * num_kv_heads * 2
    return num_layers * (attention + 3 * dim * ffn_dim + 2 * dim) + dim
