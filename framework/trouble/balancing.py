"""Balancing: a crew whose replicas take unequal shares because one is slow: whether that helps, and how long it is to last.

    asked for -> taken by all ranks at one step -> does whoever computes longest compute less?   no: alike again, for good
                                                -> the slow one needs clearly less than since then: alike again
                                                -> somebody needs clearly more:                     alike again

While work is unequal nobody is called slow for computing longer than others; every rank is compared with itself, at the shares
it has. Alike again, whoever is still slow, or slow otherwise, is named anew within a few steps.

Rule of this file: it is told what is seen, and says what is due. `balancer.py` asks the ranks and tells people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fault_tolerance.detection.balance import LEAST_GAIN, Shares, balanced
from fault_tolerance.detection.verdict import Verdict
from framework.config import Config
from parallel.layout import Layout

HOLD_STEPS = 8  # so long a change must last
LESS = 0.75  # times what the slow one computed when shares had become unequal
MORE = 1.25  # times what the longest then was
ASK_AGAIN_S = 30.0


class Due(Enum):
    """What is to be done now."""

    NOTHING = 0
    ASK = 1  # the request was lost
    TELL = 2  # what came of it
    ALIKE = 3


@dataclass(slots=True)
class Balancing:
    """One stretch of unequal shares. `before_s`: a step before, in which the slowest rank computed for `longest_s`; `healthy_s`:
    one if nobody were slow; `after_s`: one with these shares, 0 while unknown. `why` tells of what is due.
    """

    verdict: Verdict
    shares: Shares
    before_s: float
    healthy_s: float
    longest_s: float
    asked_s: float
    since: int | None = None
    after_s: float = 0.0
    helped: bool = True
    ending: bool = False
    why: str = ""
    usual: dict[int, float] = field(default_factory=dict)
    changed: int | None = None

    def look(self, step: int, computing_s: Mapping[int, float], step_s: float, now_s: float) -> Due:
        """What is due at a step: `computing_s` is how long ranks compute in a step by now, without anybody until that is known."""
        if self.since is None or self.ending:
            if now_s - self.asked_s < ASK_AGAIN_S:
                return Due.NOTHING
            self.asked_s = now_s
            return Due.ASK
        if not computing_s:
            return Due.NOTHING
        if not self.usual:
            return self._settled(computing_s, step_s, now_s)
        why = self._change(computing_s)
        self.changed = None if not why else step if self.changed is None else self.changed
        if self.changed is None or step - self.changed < HOLD_STEPS:
            return Due.NOTHING
        return self._over(why, now_s)

    def _settled(self, computing_s: Mapping[int, float], step_s: float, now_s: float) -> Due:
        self.usual, longest_s = dict(computing_s), max(computing_s.values())
        self.after_s = max(self.before_s - self.longest_s + longest_s, self.healthy_s)
        self.why = (
            f"the longest that a rank computes is {longest_s:.3f} s a step with these shares, {self.longest_s:.3f} s before;"
            f" steps take {step_s:.3f} s, {self.before_s:.3f} s before, {self.shares.step_s:.3f} s expected"
        )
        if longest_s <= (1 - LEAST_GAIN) * self.longest_s:
            return Due.TELL
        self.helped = False
        return self._over(f"{self.why}: it does not help", now_s)

    def _change(self, computing_s: Mapping[int, float]) -> str:
        """What is not as it was when shares had become unequal, or nothing."""
        times = {rank: seconds / self.usual[rank] for rank, seconds in computing_s.items() if self.usual.get(rank)}
        slow = [times[rank] for rank in self.verdict.ranks if rank in times]
        if slow and max(slow) < LESS:
            return f"rank {', '.join(map(str, self.verdict.ranks))} computes {max(slow):.2f} times as long as with these shares at first"
        worst = max(computing_s, key=lambda rank: computing_s[rank])
        if computing_s[worst] > MORE * max(self.usual.values()):
            return f"rank {worst} computes {computing_s[worst] / self.usual[worst]:.2f} times as long as with these shares at first"
        return ""

    def _over(self, why: str, now_s: float) -> Due:
        self.ending, self.why, self.asked_s = True, why, now_s
        return Due.ALIKE


def relief(
    config: Config, layout: Layout, num_microbatches: int, slow: Sequence[Verdict], *, step_s: float, healthy_s: float
) -> Shares:
    """The shares that would suit the slow ones, all ranks of whose replicas wait for them; empty, with the reason, where none would."""
    if config.layout.engine != "fsdp":
        return Shares((), step_s, f"layout.engine={config.layout.engine} keeps equal shares")
    if config.layout.compile:
        return Shares((), step_s, "layout.compile: microbatches of another size would be compiled anew, on every rank, while others wait")
    slowness = [1.0] * layout.dp
    for verdict in slow:
        for rank in verdict.ranks:
            replica = layout.seat(rank)[1]
            slowness[replica] = max(slowness[replica], verdict.severity)
    worst = max(slowness)
    compute_s = (step_s - healthy_s) / (worst - 1) if worst > 1 else 0.0
    return balanced(
        slowness, global_batch=config.optim.global_batch, num_microbatches=num_microbatches, step_s=step_s, compute_s=compute_s
    )
