"""Weighing: what could be done about somebody slow, what each way costs and brings, and which one is ripe.

    suspected -> pair test -> not confirmed: nothing, and no new test before the suspicion has lasted four times as long
                           -> confirmed:     ignore | re-balance | re-seat | swap | shrink, by ski rental
                                             (fault_tolerance/detection/actions.py)

    re-balance the slow replica takes fewer samples, the others more (balancing.py); nobody stops for it
    re-seat    a new process in the same place, where the machine's other ranks are well; once a machine
    swap       a warm spare takes the machine's place, the layout stays
    shrink     the machine is left out, another layout on what is left

Rule of this file: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fault_tolerance.detection.actions import Action, Option
from fault_tolerance.detection.balance import Shares
from fault_tolerance.detection.pairtest import confirmed, judge_compute, judge_ways
from fault_tolerance.detection.verdict import Kind, Topology, Verdict

AGAIN = 4  # times as long until a suspicion that was not confirmed is tested again


@dataclass(frozen=True, slots=True)
class Outlook:
    """A machine left out: whether a warm spare takes its place, and how long a step takes then against a healthy one now.

    `ratio` None: nothing could train without it.
    """

    spare: bool
    ratio: float | None


@dataclass(slots=True)
class Tried:
    """What earlier crews of a run have been through: machines whose slow process was replaced, ways (from, to) that were
    stuck, and why unequal shares are not to be tried again for a machine (or, under "", for any)."""

    reseated: set[str] = field(default_factory=set)
    stuck: list[tuple[str, str]] = field(default_factory=list)
    unequal: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of training lost by ending the generation at a step boundary and mustering another; by a new process."""

    muster_s: float
    start_worker_s: float


def by_test(
    suspicion: Verdict, compute: Sequence[float], ways: Sequence[tuple[int, int, float]], topology: Topology
) -> Verdict | None:
    """The pair test's own verdict where it agrees with a suspicion, else None."""
    if suspicion.kind == Kind.SLOW_COMPUTE:
        slow = 1 + 0.5 * min(0.5, max(0.1, suspicion.severity - 1))
        found = judge_compute(dict(enumerate(compute)), topology, slow=slow)
    else:
        found = judge_ways({(a, b): seconds for a, b, seconds in ways}, topology)
    return confirmed(suspicion, found)


def ways_out(
    verdict: Verdict,
    topology: Topology,
    outlook: Outlook,
    costs: Costs,
    *,
    step_s: float,
    healthy_s: float,
    reseated: bool,
    shares: Shares | None = None,
) -> list[Option]:
    """The options, IGNORE among them, with their costs and the step time that each leads to."""
    found = [Option(Action.IGNORE, 0.0, step_s)]
    if shares is not None and shares.samples:  # batches are read again: that much less than a step
        found.append(Option(Action.REBALANCE, step_s, shares.step_s, shares.reason))
    node = evicted(verdict)
    partly = len(verdict.nodes) == 1 and set(verdict.ranks) < set(topology.ranks_of(node))
    if verdict.kind == Kind.SLOW_COMPUTE and partly and not reseated:
        cost = costs.muster_s + costs.start_worker_s
        found.append(Option(Action.RESEAT, cost, healthy_s, f"a new process on {node}, whose other ranks are well"))
    if outlook.ratio is not None and outlook.spare:
        found.append(Option(Action.SWAP, costs.muster_s, healthy_s, f"{node} out, a spare in"))
    elif outlook.ratio is not None:
        found.append(Option(Action.SHRINK, costs.muster_s, healthy_s * outlook.ratio, f"{node} out"))
    return found


def stuck_end(ways: Sequence[tuple[str, str]]) -> str | None:
    """The machine to do without when ways (from, to) were stuck, the newest last: the end of it that most of the earlier
    ones share, where they share both alike the sender. None if nothing of it was stuck before: then a new crew, with new
    connections, may do.
    """
    *before, (sender, receiver) = ways
    shared = {node: sum(node in way for way in before) for node in (sender, receiver)}
    if not any(shared.values()):
        return None
    return receiver if shared[receiver] > shared[sender] else sender


def evicted(verdict: Verdict) -> str:
    """The machine that would have to go: the slow one, or of a slow way the far end."""
    return verdict.nodes[-1]
