"""Balancing: a crew whose replicas take unequal shares because one is slow: whether that helps, and how long it is to last.

    asked for -> taken by all ranks at one step -> shorter steps than before?        no: alike again, and not tried again
                                                -> now and then a pair test: still so slow?         no: alike again
                                                -> longer steps once more:      alike again, and whoever it is is named anew

While work is unequal nobody can be called slow for how long he computes; the pair test, whose work is equal, takes that over.

Rule of this file: it is told what is seen, and says what is due. `response.py` asks the ranks and tells people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fault_tolerance.balance import LEAST_GAIN, Shares, balanced
from fault_tolerance.verdict import Verdict
from framework.config import Config
from parallel.layout import Layout

SETTLE_STEPS = 8  # until the length of a step is known
TEST_STEPS, TEST_SHARE = 40, 0.02  # between two pair tests at least, and how much of the time they may take
LONGER = 1.25  # times the step that was reached: something else has happened
LESS_SLOW = 0.7  # times as slow as before: other shares would do better
ASK_AGAIN_S = 30.0


class Due(Enum):
    """What is to be done now."""

    NOTHING = 0
    ASK = 1  # the request was lost
    TELL = 2  # what came of it
    TEST = 3
    ALIKE = 4


@dataclass(slots=True)
class Balancing:
    """One stretch of unequal shares. `before_s`: a step before; `healthy_s`: one if nobody were slow. `why` tells of what is due."""

    verdict: Verdict
    shares: Shares
    before_s: float
    healthy_s: float
    asked_s: float
    since: int | None = None
    after_s: float = 0.0
    helped: bool = True
    ending: bool = False
    why: str = ""
    longer: int = 0
    test_step: int = 0
    test_s: float = 0.0

    def taken(self, step: int, now_s: float) -> None:
        """All ranks take these shares from the step after this one on."""
        self.since, self.test_step, self.test_s = step, step + TEST_STEPS, now_s

    def look(self, step: int, step_s: float, now_s: float) -> Due:
        """What is due at a step, with steps that take so long now."""
        if self.since is None or self.ending:
            if now_s - self.asked_s < ASK_AGAIN_S:
                return Due.NOTHING
            self.asked_s = now_s
            return Due.ASK
        if step - self.since < SETTLE_STEPS or step_s <= 0:
            return Due.NOTHING
        if not self.after_s:
            return self._settled(step_s)
        if self._longer(step, step_s):
            return self._over(f"steps take {step_s:.3f} s, after {self.after_s:.3f} s with these shares: something else is slow", now_s)
        if step < self.test_step or now_s < self.test_s:
            return Due.NOTHING
        self.test_step, self.test_s = step + TEST_STEPS, now_s + ASK_AGAIN_S
        return Due.TEST

    def tested(self, found: Verdict | None, took_s: float, now_s: float) -> Due:
        """What follows from a pair test, whose own verdict on the slow one is `found`."""
        self.test_s = now_s + took_s / TEST_SHARE
        rank = ", ".join(map(str, self.verdict.ranks))
        if found is None:
            return self._over(f"rank {rank} is not slow any more, says the pair test", now_s)
        if found.severity - 1 < LESS_SLOW * (self.verdict.severity - 1):
            return self._over(f"rank {rank} is {found.severity:.2f} times as slow now, after {self.verdict.severity:.2f}", now_s)
        return Due.NOTHING

    def _settled(self, step_s: float) -> Due:
        self.after_s = step_s
        said = f"steps take {step_s:.3f} s with these shares, {self.before_s:.3f} s before, {self.shares.step_s:.3f} s expected"
        if step_s <= (1 - LEAST_GAIN / 2) * self.before_s:
            self.why = said
            return Due.TELL
        self.helped = False
        return self._over(f"{said}: it does not help", self.asked_s)

    def _longer(self, step: int, step_s: float) -> bool:
        """Longer for so many steps that it is no hiccup. Counted from the first look at which it was so."""
        if step_s <= LONGER * self.after_s:
            self.longer = 0
            return False
        self.longer = self.longer or step
        return step - self.longer >= SETTLE_STEPS

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
