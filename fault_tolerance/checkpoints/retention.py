"""Retention: which checkpoints to keep, as a pure decision with reasons.

    steps       100  200  300  400  500        keep_last=2  keep_every=200  best: lowest loss at 300
    kept             200  300  400  500        100 goes

Rule of this file: pure; `shelf.remove` does the removing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one checkpoint stays, and why."""

    step: int
    keep: bool
    reason: str


def retain(
    steps: Sequence[int],
    *,
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 0,
    losses: Mapping[int, float] | None = None,
) -> list[Verdict]:
    """What to do with each checkpoint, ascending by step.

    Kept are the newest `keep_last` (at least one), every step that `keep_every` divides (0: none for that reason), and
    the `keep_best` with the lowest loss among those whose loss is known. Raises ValueError for bad numbers.
    """
    if keep_last < 1 or keep_every < 0 or keep_best < 0:
        raise ValueError(
            f"retention: keep_last must be at least 1, keep_every and keep_best at least 0, "
            f"got {keep_last}, {keep_every}, {keep_best}; the newest checkpoint is what a resume needs"
        )
    ordered = sorted(set(steps))
    known = losses or {}
    ranked = sorted((step for step in ordered if step in known), key=lambda step: (known[step], step))
    last, best = set(ordered[-keep_last:]), set(ranked[:keep_best])
    return [_verdict(step, step in last, keep_every, step in best) for step in ordered]


def _verdict(step: int, is_last: bool, keep_every: int, is_best: bool) -> Verdict:
    if is_last:
        return Verdict(step, True, "among the newest")
    if keep_every and step % keep_every == 0:
        return Verdict(step, True, f"a multiple of {keep_every}")
    if is_best:
        return Verdict(step, True, "among the lowest losses")
    return Verdict(step, False, "newer ones are kept")
