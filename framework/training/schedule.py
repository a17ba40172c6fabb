"""Schedule: the learning rate of every step, a pure function.

    peak  |   /------------\\_        cosine, linear: fall from the end of the warm-up to schedule_steps
          |  /               \\       wsd:            stay at the peak, fall linearly over the last part
    final | /                 \\___   constant:       stay
          +--------------------------> step; after schedule_steps the last rate is kept

Steps count from 1: the first update uses lr(1), the last warm-up step uses the peak itself. A run that is cut in two,
rolled back or resumed has the same rates, because nothing but the step goes in.

Rule of this file: numbers in, a number out.
Source: warm-up-stable-decay: Hu et al., "MiniCPM" (2024), section 4; cosine: Loshchilov and Hutter, "SGDR" (2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`final_lr_ratio` is the last rate over `peak`; `decay_fraction` the part of a wsd schedule that falls."""

    kind: str
    peak: float
    warmup_steps: int
    schedule_steps: int
    final_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"optim.schedule: must be one of {', '.join(SCHEDULES)}, got {self.kind!r}; choose one")
        if self.schedule_steps < 1 or self.warmup_steps < 0:
            raise ValueError(
                "optim.schedule_steps: must be at least 1 and optim.warmup_steps at least 0, "
                f"got {self.schedule_steps} and {self.warmup_steps}; set both"
            )

    def lr(self, step: int) -> float:
        """The rate of update number `step`, from 1. A warm-up longer than the schedule is followed to its end."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return self.peak * (self.final_lr_ratio + (1 - self.final_lr_ratio) * self._height(step))

    def _height(self, step: int) -> float:
        """What is left between the final rate (0) and the peak (1)."""
        fall_from = self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            fall_from = max(fall_from, self.schedule_steps - round(self.decay_fraction * self.schedule_steps))
        done = min(1.0, max(0, step - fall_from) / max(1, self.schedule_steps - fall_from))
        return (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
