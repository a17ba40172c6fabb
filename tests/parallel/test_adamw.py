"""AdamW on shards, against the formula written out in numpy."""

from __future__ import annotations

import numpy as np
import torch

from parallel.adamw import AdamW, Slot


def slot(values: torch.Tensor, *, decays: bool) -> Slot:
    return Slot(values, torch.zeros_like(values), torch.zeros_like(values), decays)


def by_hand(p: np.ndarray, gradients: list[np.ndarray], *, lr: float, decay: float) -> np.ndarray:
    p, m, v = p.astype(np.float64), np.zeros(p.shape), np.zeros(p.shape)
    for t, g in enumerate(gradients, 1):
        p *= 1 - lr * decay
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return p


def gradients(shape: tuple[int, ...], count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_it_is_the_formula_with_decay_for_those_that_decay() -> None:
    matrix, vector = slot(torch.ones(3, 5), decays=True), slot(torch.ones(7), decays=False)
    adamw = AdamW([matrix, vector], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    pairs = list(zip(gradients((3, 5)), gradients((7,)), strict=True))
    for step, (a, b) in enumerate(pairs, 1):
        adamw.update({id(matrix.param): a.clone(), id(vector.param): b.clone()}, step=step, lr=0.1)
    expected = by_hand(np.ones((3, 5)), [a.numpy() for a, _ in pairs], lr=0.1, decay=0.5)
    np.testing.assert_allclose(matrix.param.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        vector.param.numpy(), by_hand(np.ones(7), [b.numpy() for _, b in pairs], lr=0.1, decay=0.0), rtol=1e-5
    )


def test_its_only_state_is_in_the_slots() -> None:
    """A second optimizer over the same slots, told the step, goes on where the first stopped."""
    one, other = slot(torch.ones(6), decays=False), slot(torch.ones(6), decays=False)
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    first = AdamW([one], **options)  # type: ignore[arg-type]
    for step, gradient in enumerate(gradients((6,)), 1):
        first.update({id(one.param): gradient.clone()}, step=step, lr=0.1)
        AdamW([other], **options).update({id(other.param): gradient.clone()}, step=step, lr=0.1)  # type: ignore[arg-type]
    assert torch.equal(one.param, other.param)
    assert torch.equal(one.exp_avg_sq, other.exp_avg_sq)


def test_no_gradient_is_a_gradient_of_zero() -> None:
    one, other = slot(torch.ones(2, 2), decays=True), slot(torch.ones(2, 2), decays=True)
    for shard, given in ((one, {}), (other, {id(other.param): torch.zeros(2, 2)})):
        AdamW([shard], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5).update(given, step=1, lr=0.1)
    assert torch.equal(one.param, other.param)
    assert float(one.param[0, 0]) < 1


def test_a_rank_may_hold_nothing() -> None:
    AdamW([slot(torch.ones(0, 4), decays=True)], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).update(
        {}, step=1, lr=0.1
    )
