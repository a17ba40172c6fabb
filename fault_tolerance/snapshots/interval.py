"""Interval: how often to snapshot, from what one costs and how often the job is hit.

    share of time lost  =  cost / interval        every snapshot holds training up by `cost`
                         + interval / (2 mtbf)    a failure loses half an interval, on average
                         + restart / mtbf         and costs a restart, whatever the interval

The first two are equal at Young's interval, sqrt(2 cost mtbf). With asynchronous snapshots the cost is only the stall
and the interference, so that is short, and the bound is how fast one snapshot can be finished: it must be copied,
encoded and sent before the next one starts (`least_interval_s`).

Rule of this file: seconds and bytes per second in, values out.
Source: Young, CACM 17(9), 1974; Daly, FGCS 22(3), 2006 (eq. 37, the higher-order interval).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Interval:
    """A snapshot every `steps` steps, and why."""

    steps: int
    interval_s: float
    lost_share: float
    reason: str


def young_s(*, cost_s: float, mtbf_s: float) -> float:
    """Young's interval between the starts of snapshots; infinite if nothing ever fails."""
    _positive("young_s", cost_s=cost_s, zero_ok=True)
    _positive("young_s", mtbf_s=mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) if cost_s else 0.0


def daly_s(*, cost_s: float, mtbf_s: float) -> float:
    """Daly's higher-order interval, better where the cost is no longer small against the mean time between failures."""
    young = young_s(cost_s=cost_s, mtbf_s=mtbf_s)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def lost_share(*, interval_s: float, cost_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """The share of time lost to snapshots, to work done again and to restarts (first order, so may exceed 1)."""
    _positive("lost_share", interval_s=interval_s)
    _positive("lost_share", mtbf_s=mtbf_s)
    return cost_s / interval_s + (interval_s / 2 + restart_s) / mtbf_s


def job_mtbf_s(*, node_mtbf_s: float, num_nodes: int) -> float:
    """Mean time between failures of any of the nodes, which fail independently."""
    _positive("job_mtbf_s", node_mtbf_s=node_mtbf_s, num_nodes=num_nodes)
    return node_mtbf_s / num_nodes


def stall_s(*, node_bytes: float, copy_bytes_per_s: float, overlap_s: float) -> float:
    """How long a step waits for the copy of its node's state, which runs beside `overlap_s` of forward and backward."""
    _positive("stall_s", copy_bytes_per_s=copy_bytes_per_s)
    return max(0.0, node_bytes / copy_bytes_per_s - overlap_s)


def least_interval_s(
    *,
    node_bytes: float,
    copy_bytes_per_s: float,
    encode_bytes_per_s: float,
    wire_bytes_per_s: float,
    num_nodes: int,
    m: int,
) -> float:
    """The shortest interval at which every snapshot is finished before the next: the slowest of copy, code and wire.

    Each node encodes and moves, each way, what its group of `num_nodes` with `m` parities asks of it:
    `node_bytes` x (n - 1) / (n - m) on the wire. Raises ValueError unless 0 <= m < num_nodes.
    """
    _positive("least_interval_s", copy_bytes_per_s=copy_bytes_per_s)
    _positive("least_interval_s", encode_bytes_per_s=encode_bytes_per_s, wire_bytes_per_s=wire_bytes_per_s)
    if not 0 <= m < num_nodes:
        raise ValueError(f"least_interval_s: 0 <= m < num_nodes must hold, got m={m} and num_nodes={num_nodes}")
    copy = node_bytes / copy_bytes_per_s
    if m == 0:
        return copy
    wire = node_bytes * (num_nodes - 1) / (num_nodes - m)
    return max(copy, node_bytes / encode_bytes_per_s, wire / wire_bytes_per_s)


def choose(*, cost_s: float, mtbf_s: float, step_s: float, least_s: float = 0.0, restart_s: float = 0.0) -> Interval:
    """Young's interval in whole steps, rounded up, not below `least_s` nor below one step.

    Raises ValueError if nothing bounds it (`mtbf_s` infinite) or a number is not positive.
    """
    _positive("choose", step_s=step_s)
    best = young_s(cost_s=cost_s, mtbf_s=mtbf_s)
    if math.isinf(best):
        raise ValueError(f"choose: mtbf_s must be finite, got {mtbf_s}; set every_steps to a number instead")
    floor = max(least_s, step_s)
    steps = max(1, math.ceil(max(best, floor) / step_s - 1e-9))
    bound = "Young's interval" if best > floor else "the least interval" if least_s > step_s else "one step"
    every = steps * step_s
    share = lost_share(interval_s=every, cost_s=cost_s, mtbf_s=mtbf_s, restart_s=restart_s)
    reason = (
        f"every {steps} steps ({every:.3g} s): {bound} for a cost of {cost_s:.3g} s, one failure per {mtbf_s:.3g} s "
        f"and at least {least_s:.3g} s per snapshot; {share:.2%} of the time is lost"
    )
    return Interval(steps=steps, interval_s=every, lost_share=share, reason=reason)


def fixed(steps: int) -> Interval:
    """As configured: nothing to explain."""
    return Interval(steps=steps, interval_s=0.0, lost_share=0.0, reason="")


def at_most(steps: int | None, interval: Interval) -> Interval:
    """The same, but not longer than this; None: however long it is."""
    if steps is None or interval.steps <= steps:
        return interval
    return replace(interval, steps=steps, reason=f"{interval.reason}; every {steps} steps, for no more may be lost")


def young(cost_s: float, step_s: float, mtbf_s: float) -> Interval:
    """As `choose`; every step as long as no step has been measured."""
    return choose(cost_s=cost_s, mtbf_s=mtbf_s, step_s=step_s) if step_s > 0 else fixed(1)


def _positive(where: str, *, zero_ok: bool = False, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 or (zero_ok and value == 0)):
            raise ValueError(f"{where}: {name} must be {'>= 0' if zero_ok else '> 0'}, got {value}")
