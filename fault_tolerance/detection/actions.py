"""Actions: what to do about somebody slow, by what it costs against what it saves.

    lost so far      |....../      escalate where the line of what was lost crosses an action's cost:
                     |..../-----   evict   40 s     at worst twice the cost of knowing the future (ski rental)
                     |../-------   re-balance 5 s
                     |/---------   ignore  0 s

Slowness may end by itself, so a costly action waits until as much has been lost as it costs; and one that cannot pay back
before the run ends is never taken. All options with their figures are in the decision, so that a person can disagree.

Rule of this file: pure. Source: GREYHOUND's ladder; ski rental, Karlin et al. (1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Action(IntEnum):
    """From cheap to costly."""

    IGNORE = 0
    REBALANCE = 1  # fewer samples for the slow replica (balance.py)
    RESEAT = 2  # the slow one where it hurts least
    SWAP = 3  # a spare takes its place
    SHRINK = 4  # go on without it, on a smaller layout


@dataclass(frozen=True, slots=True)
class Option:
    """`cost_s`: seconds of training lost by doing it once. `step_s`: length of a step afterwards."""

    action: Action
    cost_s: float
    step_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The action to take now; `comparison` has a line for each option; `next_at_s` is the loss at which to ask again."""

    action: Action
    reason: str
    comparison: tuple[str, ...]
    next_at_s: float | None = None


def choose(
    options: Sequence[Option], *, step_s: float, healthy_step_s: float, steps_left: int, lost_s: float
) -> Choice:
    """What to do about a slowness that makes steps last `step_s` instead of `healthy_step_s`.

    `lost_s` is what it has cost since it began. Raises ValueError if a time is not positive.
    """
    if step_s <= 0 or healthy_step_s <= 0:
        raise ValueError(f"choose: step times must be positive, got {step_s} and {healthy_step_s}")
    lines, paying = [], []
    for option in sorted(options, key=lambda o: (o.cost_s, o.action)):
        saves_s = (step_s - option.step_s) * steps_left
        pays = saves_s > option.cost_s and option.action != Action.IGNORE
        word = "ripe" if pays and lost_s >= option.cost_s else "later" if pays else "never pays"
        lines.append(
            f"{option.action.name.lower()}: costs {option.cost_s:.1f} s, step {option.step_s:.3f} s, saves"
            f" {saves_s:.1f} s in {steps_left} steps: {word}" + (f" ({option.note})" if option.note else "")
        )
        if pays:
            paying.append(option)
    ripe = [o for o in paying if lost_s >= o.cost_s]
    unripe = [o for o in paying if lost_s < o.cost_s]
    best = min(ripe, key=lambda o: o.cost_s + o.step_s * steps_left, default=None)
    better = [o.cost_s for o in unripe if best is None or o.step_s < best.step_s]
    next_at = min(better, default=None)
    lost = f"{lost_s:.1f} s lost so far"
    if best is None:
        reason = f"ignore: {lost}, " + (f"the next action costs {next_at:.1f} s" if better else "no action pays")
        return Choice(Action.IGNORE, reason, tuple(lines), next_at)
    reason = f"{best.action.name.lower()}: {lost}, it costs {best.cost_s:.1f} s and brings steps to {best.step_s:.3f} s"
    return Choice(best.action, reason, tuple(lines), next_at)
