"""Stragglers: who needs longer for the same work, judged by the time in which it waits for nobody.

    own time of rank r in a step = the step, less the time it blocked in operations with others

    peers    the other ranks of its pipeline stage do the same work       2.0x of its peers:       blamed
    past     its own level before, against everybody's                    2.0x, everybody 2.0x:    nobody is blamed

A victim waits, so its own time does not grow, however long the chain from the culprit to it; a pipeline's bubble is a
wait as well; and a stage with more layers is compared with itself. Medians over a window of steps, and most steps of it
must agree, so that one hiccup, or a different rank each time, blames nobody.

Rule of this file: pure. Source: C4 (non-communication slow) and GREYHOUND, turned from clocks to waits.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fault_tolerance.timeline import Meeting, StepSpan
from fault_tolerance.verdict import Kind, Topology, Verdict

Spans = Mapping[int, Mapping[int, StepSpan]]  # by rank and step


@dataclass(frozen=True, slots=True)
class Rule:
    """When slow is too slow: `ratio` of the window's medians, in `agree` of its steps, costing `impact` of the step."""

    window: int = 6
    ratio: float = 1.18
    agree: float = 0.66
    impact: float = 0.04
    least_s: float = 0.001


@dataclass(frozen=True, slots=True)
class Measure:
    """One rank over the window: seconds of own time, of its reference, and of its step, and the share of steps over it."""

    rank: int
    own_s: float
    reference_s: float
    step_s: float
    agree: float
    against: str

    @property
    def ratio(self) -> float:
        """Own time against the reference."""
        return self.own_s / self.reference_s if self.reference_s > 0 else 1.0


def judge_stragglers(
    spans: Spans, topology: Topology, *, levels: Mapping[int, float] | None = None, rule: Rule | None = None
) -> list[Verdict]:
    """Verdicts on the newest window of steps that all ranks have finished; none before there is one.

    `levels` are the own times, in seconds by rank, of a time when all was well.
    """
    rule = rule or Rule()
    steps = common_steps(spans, rule.window)
    if len(steps) < rule.window:
        return []
    level = levels or {}
    seen = {rank: newest(by_step, steps, rule.window) for rank, by_step in spans.items()}
    peers = [m for rank in spans if (m := against_peers(rank, seen, topology, rule))]
    past = [m for rank in spans if (m := against_past(rank, seen, level, rule))]
    slow = {m.rank: m for m in past if _too_slow(m, rule) and _not_the_work(m.rank, past, topology, rule)}
    slow |= {m.rank: m for m in peers if _too_slow(m, rule)}
    if slow:
        return _by_node(slow, steps, topology)
    return _everybody(seen, steps, level, rule) or _wandering(spans, steps, topology, rule)


def common_steps(spans: Spans, window: int) -> list[int]:
    """The newest steps, ascending, that most ranks have finished and noted; at most `window`."""
    counts = Counter(step for by_step in spans.values() for step in by_step)
    last = min((max(by_step, default=-1) for by_step in spans.values()), default=-1)
    return sorted(step for step, count in counts.items() if count >= 0.6 * len(spans) and step <= last)[-window:]


def newest(by_step: Mapping[int, StepSpan], steps: Sequence[int], window: int) -> dict[int, StepSpan]:
    """A rank's newest spans, at most `window`, up to the last of `steps` and not much older than the first.

    Without lost records these are exactly `steps`. Empty if there are too few to say anything.
    """
    low, high = steps[0] - len(steps), steps[-1]
    chosen = [s for s in sorted(by_step) if low <= s <= high][-window:]
    return {s: by_step[s] for s in chosen} if 2 * len(chosen) > window else {}


def against_peers(rank: int, seen: Spans, topology: Topology, rule: Rule) -> Measure | None:
    """A rank beside those who do the same work. None if it has no peers or too little is known."""
    others = [peer for peer in topology.peers(rank) if seen.get(peer)]
    if not seen[rank] or not others:
        return None
    reference = statistics.median_low([_own_s(seen[peer]) for peer in others])
    each = {}
    for step in seen[rank]:
        at_step = [seen[p][step].own_s for p in others if step in seen[p]]
        each[step] = statistics.median_low(at_step) if at_step else reference
    return _measure(rank, reference, each, seen[rank], rule, "its peers")


def against_past(rank: int, seen: Spans, levels: Mapping[int, float], rule: Rule) -> Measure | None:
    """A rank beside its own past, corrected by how everybody changed. None where the past is not known."""
    known = [r for r in seen if levels.get(r, 0) > 0 and seen[r]]
    if rank not in known or len(known) < 2:
        return None
    each = {}
    for step in seen[rank]:
        changes = [seen[r][step].own_s / levels[r] for r in known if step in seen[r]]
        each[step] = levels[rank] * statistics.median_low(changes)
    everybody = statistics.median_low([_own_s(seen[r]) / levels[r] for r in known])
    return _measure(rank, levels[rank] * everybody, each, seen[rank], rule, "its own past")


def waits_caused(meetings: Iterable[Meeting]) -> dict[int, tuple[float, float]]:
    """For each rank, seconds that others waited for it in collectives, and seconds that it waited for others.

    The wait of a member is what it spent inside beyond the one that came last, each on its own clock.
    """
    caused: defaultdict[int, float] = defaultdict(float)
    suffered: defaultdict[int, float] = defaultdict(float)
    for meeting in meetings:
        if meeting.complete and len(meeting.came) > 1:
            inside = {rank: (r.end_ns - r.call_ns) / 1e9 for rank, r in meeting.came.items()}
            last = min(inside, key=lambda rank: inside[rank])
            for rank, seconds in inside.items():
                suffered[rank] += seconds - inside[last]
                caused[last] += seconds - inside[last]
    return {rank: (caused[rank], suffered[rank]) for rank in caused.keys() | suffered.keys()}


def _measure(
    rank: int, reference: float, each: Mapping[int, float], mine: Mapping[int, StepSpan], rule: Rule, against: str
) -> Measure:
    half = 1 + (rule.ratio - 1) / 2
    over = [mine[step].own_s > half * usual for step, usual in each.items()]
    step_s = statistics.median(span.duration_s for span in mine.values())
    return Measure(rank, _own_s(mine), reference, step_s, sum(over) / len(over), against)


def _own_s(mine: Mapping[int, StepSpan]) -> float:
    return statistics.median(span.own_s for span in mine.values())


def _too_slow(m: Measure, rule: Rule) -> bool:
    extra = m.own_s - m.reference_s
    return m.ratio >= rule.ratio and m.agree >= rule.agree and extra >= max(rule.impact * m.step_s, rule.least_s)


def _not_the_work(rank: int, past: Sequence[Measure], topology: Topology, rule: Rule) -> bool:
    """False where a stage that spans machines got slower as a whole: then its work changed, not a machine."""
    stage = (rank, *topology.peers(rank))
    slower = [m.rank for m in past if m.rank in stage and _too_slow(m, rule)]
    return len(slower) < len(stage) or len(topology.on(stage)) == 1


def _by_node(slow: Mapping[int, Measure], steps: Sequence[int], topology: Topology) -> list[Verdict]:
    out = []
    for node in topology.on(sorted(slow)):
        measures = [slow[r] for r in topology.ranks_of(node) if r in slow]
        worst = max(measures, key=lambda m: m.ratio)
        ranks = tuple(m.rank for m in measures)
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        reason = (
            f"{named} on {node} computes {worst.ratio:.2f} times as long as {worst.against}"
            f" ({worst.own_s * 1e3:.1f} ms of its own against {worst.reference_s * 1e3:.1f} ms, steps {steps[0]}-{steps[-1]})"
        )
        evidence = tuple(
            f"rank {m.rank}: {m.own_s * 1e3:.2f} ms, {m.against} {m.reference_s * 1e3:.2f} ms, in {m.agree:.0%} of steps"
            for m in measures
        )
        sure = min(0.99, 0.6 + 0.4 * min(1.0, worst.ratio - 1) * worst.agree)
        out.append(
            Verdict(Kind.SLOW_COMPUTE, ranks, (node,), reason, evidence=evidence, confidence=sure, severity=worst.ratio)
        )
    return out


def _everybody(seen: Spans, steps: Sequence[int], levels: Mapping[int, float], rule: Rule) -> list[Verdict]:
    known = [(_own_s(mine), levels[r]) for r, mine in seen.items() if levels.get(r, 0) > 0 and mine]
    if len(known) < 2:
        return []
    ratio = statistics.median_low([own / level for own, level in known])
    if ratio < rule.ratio:
        return []
    reason = (
        f"all ranks compute {ratio:.2f} times as long as before (steps {steps[0]}-{steps[-1]}): nobody in particular"
    )
    return [Verdict(Kind.SLOW_ALL, (), (), reason, confidence=0.8, severity=ratio)]


def _wandering(spans: Spans, steps: Sequence[int], topology: Topology, rule: Rule) -> list[Verdict]:
    """Somebody holds up most steps by twice the rule, but nobody does so twice as often as another."""
    slowest: list[int] = []
    for step in steps:
        ratios = {}
        for rank in spans:
            others = [spans[p][step].own_s for p in topology.peers(rank) if p in spans and step in spans[p]]
            if step in spans[rank] and others:
                extra = spans[rank][step].own_s - statistics.median_low(others)
                if extra > 2 * (rule.ratio - 1) * statistics.median_low(others):
                    ratios[rank] = extra / spans[rank][step].duration_s
        if ratios and max(ratios.values()) > 2 * rule.impact:
            slowest.append(max(ratios, key=lambda r: ratios[r]))
    if len(slowest) < 0.8 * len(steps) or len(set(slowest)) < 3:
        return []
    reason = f"in {len(slowest)} of {len(steps)} steps somebody was late, each time another rank ({slowest}): nobody to blame"
    return [Verdict(Kind.WANDERING, (), (), reason, confidence=0.6)]
