"""Balance: how many samples each data-parallel replica takes of a global batch, so that a slow one holds up nobody.

    replica 1 needs twice as long, 16 samples          equal     8 samples  8 samples     step 16 (replica 1)
                                                       balanced  11         5             step 11 (replica 0)

All replicas keep the same number of microbatches, so that their collectives match, and differ in the rows of one. What is dealt
out are rows through all microbatches, at least one to each replica; dealing to whoever would be done first is exact.

Rule of this file: pure. A step is predicted from one thing that was measured: how long a replica that is well computes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GAIN = 0.05  # of the step; what brings less is not worth telling anybody


@dataclass(frozen=True, slots=True)
class Shares:
    """Samples of a global batch by replica, and the step they should lead to. Empty: there is nothing to gain, and why."""

    samples: tuple[int, ...]
    step_s: float
    reason: str


def balanced(
    slowness: Sequence[float], *, global_batch: int, num_microbatches: int, step_s: float, compute_s: float
) -> Shares:
    """The shares that make the step shortest. `slowness[i]`: how many times longer replica i computes than one that is well,
    which needs `compute_s` of a step that lasts `step_s` now, with equal shares.
    """
    dp = len(slowness)
    rows = -(-global_batch // num_microbatches)
    equal = -(-rows // dp)
    if dp == 1:
        return Shares((), step_s, "there is one replica (dp 1), and no other to take samples from it")
    if rows <= dp:
        return Shares((), step_s, f"each replica has one row a microbatch ({global_batch} samples, dp {dp}, {num_microbatches} microbatches)")
    counts = deal(slowness, rows)
    now, then = (max(n * s for n, s in zip(given, slowness, strict=True)) / equal for given in ((equal,) * dp, counts))
    after_s = max(step_s - compute_s * (now - then), 0.0)
    if after_s > (1 - LEAST_GAIN) * step_s:
        return Shares((), step_s, f"the best shares, {_words(counts)} of {rows} rows, would leave the step at {after_s:.3f} s")
    samples = [n * num_microbatches for n in counts]
    for _ in range(rows * num_microbatches - global_batch):  # the last row is not full: who has most to do has one less
        samples[max(range(dp), key=lambda i: samples[i] * slowness[i])] -= 1
    reason = f"replicas take {_words(samples)} of {global_batch} samples, for they compute {', '.join(f'{s:.2f}' for s in slowness)} times as long"
    return Shares(tuple(samples), after_s, reason)


def deal(seconds_each: Sequence[float], total: int) -> tuple[int, ...]:
    """How many of `total` each gets, at least one, so that the slowest is done as early as can be.

    `seconds_each[i]` is replica i's time for one. Exact. Raises ValueError if there are fewer than replicas.
    """
    if total < len(seconds_each) or min(seconds_each, default=0) <= 0:
        raise ValueError(f"deal: needs {len(seconds_each)} or more to deal out and positive times, got {total}")
    counts = [1] * len(seconds_each)
    heap = [(2 * s, i) for i, s in enumerate(seconds_each)]
    heapq.heapify(heap)
    for _ in range(total - len(counts)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        heapq.heappush(heap, ((counts[i] + 1) * seconds_each[i], i))
    return tuple(counts)


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
