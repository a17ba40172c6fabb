"""DeepSpeed's inner optimizer: torch's AdamW over ZeRO's flat partitions, as ZeRO calls it.

ZeRO calls `step` once for each group, with `param_groups` cut down to it. What the seam says of a step (its number,
the rate, the scale of the gradients) is told before, once for all of them.

Rule of this file: the same rule and kernel as `adamw.py`; DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from parallel.flat import decays


class HostedAdamW(torch.optim.AdamW):
    """AdamW whose moments exist from the start (`adopt`), and whose steps are told to it (`next`)."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        """`parameters` that are trained, in the order of the state."""
        everything = list(parameters)
        groups = [
            {"params": [p for p in everything if decays(tuple(p.shape)) is d], "weight_decay": weight_decay * d}
            for d in (True, False)
        ]
        super().__init__([group for group in groups if group["params"]], betas=betas, eps=eps, fused=True)
        self._number, self._lr, self._scale = 0, 0.0, 1.0

    def next(self, *, step: int, lr: float, grad_scale: float) -> None:
        """What the next step is: its number (1-based), its rate, and what gradients are multiplied by before."""
        self._number, self._lr, self._scale = step, lr, grad_scale

    def adopt(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make the moments of a flat partition, zero; they are the ones that every later step uses."""
        self.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }
        return {"param": flat.detach(), "exp_avg": self.state[flat]["exp_avg"], "exp_avg_sq": self.state[flat]["exp_avg_sq"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `next`. `closure` is for those who have one; ZeRO has not."""
        for group in self.param_groups:
            group["lr"] = self._lr
            for flat in group["params"]:
                if self._scale != 1.0:
                    flat.grad.mul_(self._scale)
                self.state[flat]["step"].fill_(self._number - 1)
        super().step()
