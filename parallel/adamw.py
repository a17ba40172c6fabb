"""AdamW on the shards that a rank holds.

    p <- p - lr * decay * p                     decay only for tensors of two and more dimensions
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
    p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Elementwise, so any cut of a tensor updates to the same values. Moments exist from the start, as a snapshot expects
them. Torch's fused kernel does the work, one call for each decay group.

Source: decoupled weight decay (arXiv 1711.05101).

Rule of this file: plain local tensors; no meshes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """A local shard with its moments, all fp32 and of one shape."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool


class AdamW:
    """The update rule over a rank's slots. It has no state beside the slots: the step number comes with each call."""

    def __init__(self, slots: Sequence[Slot], *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._slots = [slot for slot in slots if slot.param.numel()]
        groups = [
            {"params": [s.param for s in self._slots if s.decays is decays], "weight_decay": weight_decay * decays}
            for decays in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        self._torch: torch.optim.AdamW | None = None
        if groups:
            self._torch = _with_moments(torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True), self._slots)

    def update(self, gradients: dict[int, Tensor], *, step: int, lr: float) -> None:
        """Take optimizer step number `step` (1-based). `gradients` by `id` of the slot's param; a missing one is zero."""
        if self._torch is None:
            return
        for group in self._torch.param_groups:
            group["lr"] = lr
        for slot in self._slots:
            gradient = gradients.get(id(slot.param))
            slot.param.grad = torch.zeros_like(slot.param) if gradient is None else gradient
            self._torch.state[slot.param]["step"].fill_(step - 1)
        self._torch.step()
        self._torch.zero_grad(set_to_none=True)


def _with_moments(optimizer: torch.optim.AdamW, slots: Sequence[Slot]) -> torch.optim.AdamW:
    """Let it find the slots' moments where it would make its own on the first step."""
    for slot in slots:
        optimizer.state[slot.param] = {
            "step": torch.zeros((), dtype=torch.float32, device=slot.param.device),
            "exp_avg": slot.exp_avg,
            "exp_avg_sq": slot.exp_avg_sq,
        }
    return optimizer
