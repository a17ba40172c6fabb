"""Layout: the degrees of the axes, and which rank sits where.

    pp is the slowest axis and tp the fastest:   rank = (pp_i * dp + dp_i) * tp + tp_i

    2x2x2    stage 0: 0 1 | 2 3     one row per pipeline stage, `|` parts the data-parallel
             stage 1: 4 5 | 6 7     replicas, neighbours are tensor-parallel peers

so that a stage is a contiguous block of ranks, and tensor-parallel peers, which talk most, sit side by side.

Rule of this file: pure values. It knows no model, node or process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Degrees of the axes. `str()` gives and `parse` takes `2x2x1`, in the order pp x dp x tp."""

    pp: int = 1
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"layout.{axis}: must be at least 1, got {getattr(self, axis)}")

    def __str__(self) -> str:
        return f"{self.pp}x{self.dp}x{self.tp}"

    @staticmethod
    def parse(text: str) -> Layout:
        """The inverse of `str()`. Raises ValueError on anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"layout: must read like 2x2x1 (pp x dp x tp), got {text!r}")
        return Layout(*map(int, match.groups()))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    def seat(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) coordinates of a rank. Raises ValueError if there is no such rank."""
        if not 0 <= rank < self.world:
            raise ValueError(f"layout {self}: rank must be in [0, {self.world}), got {rank}")
        rest, tp = divmod(rank, self.tp)
        return (*divmod(rest, self.dp), tp)

    def rank(self, pp: int, dp: int, tp: int) -> int:
        """The rank at these coordinates."""
        return (pp * self.dp + dp) * self.tp + tp
