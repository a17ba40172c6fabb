"""Stragglers: who needs longer for the same work, judged by the time in which it waits for nobody.

    own time of rank r in a step = the step, less the time it blocked in operations with others

    peers    the other ranks of its pipeline stage do the same work       2.0x of its peers:       blamed
    past     its own level before, against everybody's                    2.0x, everybody 2.0x:    nobody is blamed
             and peers elsewhere need less                                as long as its peers:    nobody waits for it

A victim waits, so its own time does not grow, however long the chain from the culprit to it; a pipeline's bubble is a
wait as well; and a stage with more layers is compared with itself. Middles over a window of steps, most steps of it must
agree, and the difference must stand far out of the noise: where it does not, a window one step longer may be sure.

Rule of this file: pure. Source: C4 (non-communication slow) and GREYHOUND, turned from clocks to waits; the middle of a window is
that of Hodges and Lehmann (1963), nearly as exact as a mean and nearly as hard to mislead as a median.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from fault_tolerance.detection.timeline import Meeting, StepSpan
from fault_tolerance.detection.verdict import Kind, Topology, Verdict

Spans = Mapping[int, Mapping[int, StepSpan]]  # by rank and step
LEARNT_STEPS = 8  # that a level is the median of
BLUNT = 1.05  # how much less exact a middle is than a mean


@dataclass(frozen=True, slots=True)
class Rule:
    """When slow is too slow: `ratio` of the middles over a window of steps, in `agree` of its steps, costing `impact` of
    the step, and `sigmas` standard errors away. The longest window also finds `drift`."""

    windows: tuple[int, ...] = (6, 7, 8, 9, 10, 12, 16, 24)
    ratio: float = 1.18
    drift: float = 1.08
    agree: float = 0.8
    impact: float = 0.04
    sigmas: float = 5.6
    least_s: float = 0.001

    @property
    def window(self) -> int:
        """The shortest window."""
        return self.windows[0]

    def least(self, window: int) -> float:
        """The ratio that counts in a window."""
        return self.drift if window == self.windows[-1] else self.ratio


@dataclass(frozen=True, slots=True)
class Measure:
    """One rank over a window: seconds of own time, of its reference, and of its step; the share of steps over it, if the middle is; whom it was
    compared with, and by how much less than in one step noise shows in the ratio."""

    rank: int
    own_s: float
    reference_s: float
    step_s: float
    agree: float
    others: tuple[int, ...]
    blur: float
    against: str

    @property
    def ratio(self) -> float:
        """Own time against the reference."""
        return self.own_s / self.reference_s if self.reference_s > 0 else 1.0


def judge_stragglers(
    spans: Spans, topology: Topology, *, levels: Mapping[int, float] | None = None, rule: Rule | None = None
) -> list[Verdict]:
    """Verdicts on the newest steps that all ranks have finished, by the shortest window that is sure; at first none.

    `spans` may hold more than the windows: the noise is learnt from it. `levels` are the own times, in seconds by rank,
    of a time when all was well.
    """
    rule = rule or Rule()
    levels, noise = levels or {}, Noise(spans)
    general: list[Verdict] = []
    suspected = False
    for window in rule.windows:
        steps = window_steps(spans, window)
        if not steps:
            break
        if not suspected and window not in (rule.windows[0], rule.windows[-1]):
            continue  # a longer window makes sure of what the newest steps show
        seen = {rank: newest(by_step, steps, window) for rank, by_step in spans.items()}
        middles = {rank: middle_s(mine) for rank, mine in seen.items() if mine}
        peers, past = _measures(seen, middles, topology, levels, rule.least(window))
        slow = _slow(peers, past, topology, noise, rule, rule.least(window))
        if slow:
            return _by_node(slow, steps, topology)
        suspected = suspected or any(m.ratio >= rule.ratio for m in (*peers.values(), *past.values()))
        general = general or _everybody(middles, steps, levels, rule) or _wandering(spans, steps, topology, rule)
    return general


class Noise:
    """The spread of each rank's own time from step to step, as a standard deviation of its logarithm; learnt when first asked for."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._known: dict[int, float] = {}

    def between(self, rank: int, others: Iterable[int]) -> float:
        """That of the difference to the middle one of others."""
        return math.hypot(self._of(rank), statistics.median(self._of(other) for other in others))

    def _of(self, rank: int) -> float:
        if rank not in self._known:
            self._known[rank] = noise_of(self._spans[rank])
        return self._known[rank]


def noise_of(by_step: Mapping[int, StepSpan], *, last: int = 40) -> float:
    """Between neighbouring steps, so that a new level is none."""
    logs = [math.log(max(span.own_s, 1e-6)) for _, span in sorted(by_step.items())[-last:]]
    if len(logs) < 3:
        return 1.0
    return 1.4826 * statistics.median(abs(b - a) for a, b in pairwise(logs)) / math.sqrt(2)


def _measures(
    seen: Spans, middles: Mapping[int, float], topology: Topology, levels: Mapping[int, float], least: float
) -> tuple[dict[int, Measure], dict[int, Measure]]:
    """Each rank beside its peers, and beside its own past, where there is something to compare it with."""
    peers = {rank: m for rank in seen if (m := against_peers(rank, seen, middles, topology, least))}
    past = {rank: m for rank in seen if (m := against_past(rank, seen, middles, levels, least))}
    return peers, past


def _slow(
    peers: Mapping[int, Measure], past: Mapping[int, Measure], topology: Topology, noise: Noise, rule: Rule, least: float
) -> dict[int, Measure]:
    """The ranks that are too slow. What is little must show against peers, where there are any, and past alike."""
    by_peers = {r for r, m in peers.items() if _too_slow(m, noise, rule, least)}
    over_past = {r for r, m in past.items() if _too_slow(m, noise, rule, least)}
    by_past = {r for r in over_past if _not_the_work(r, over_past, topology) and _keeps_waiting(r, peers, topology, least)}
    if least < rule.ratio:
        found = {r for r in by_past if r in by_peers or r not in peers}
        return {r: past[r] for r in found}
    return {r: peers[r] if r in by_peers else past[r] for r in by_peers | by_past}


def middle_s(mine: Mapping[int, StepSpan]) -> float:
    """The middle of a rank's own times: the median of the means of all pairs of them."""
    own = np.array([span.own_s for span in mine.values()])
    pairs = np.sort(np.add.outer(own, own)[_pairs(len(own))]) / 2
    return float(pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2


@cache
def _pairs(num: int) -> np.ndarray:
    """Which of all pairs (i, j) have i <= j."""
    return np.tri(num, dtype=bool)


def last_step(spans: Spans) -> int:
    """The newest step that most ranks have finished and noted; -1 if there is none."""
    return statistics.median_low([max(by_step, default=-1) for by_step in spans.values()]) if spans else -1


def window_steps(spans: Spans, window: int) -> range:
    """The newest `window` steps; empty as long as there are not that many."""
    first = statistics.median_low([min(by_step, default=0) for by_step in spans.values()]) if spans else 0
    last = last_step(spans)
    return range(last - window + 1, last + 1) if last - first + 1 >= window else range(0)


def newest(by_step: Mapping[int, StepSpan], steps: Sequence[int], window: int) -> dict[int, StepSpan]:
    """A rank's newest spans, at most `window`, up to the last of `steps` and not much older than the first.

    Without lost records these are exactly `steps`. Empty if there are too few to say anything.
    """
    low, high = steps[0] - len(steps), steps[-1]
    chosen = [s for s in sorted(by_step) if low <= s <= high][-window:]
    return {s: by_step[s] for s in chosen} if 2 * len(chosen) > window else {}


def against_peers(
    rank: int, seen: Spans, middles: Mapping[int, float], topology: Topology, least: float
) -> Measure | None:
    """A rank beside those who do the same work. None if it has no peers or too little is known."""
    others = tuple(peer for peer in topology.peers(rank) if seen.get(peer))
    if not seen[rank] or not others:
        return None
    reference = statistics.median_low([middles[peer] for peer in others])
    each: dict[int, float] = {}
    for step in seen[rank] if middles[rank] > half(least) * reference else ():
        at_step = [seen[p][step].own_s for p in others if step in seen[p]]
        each[step] = statistics.median_low(at_step) if at_step else reference
    blur = BLUNT / math.sqrt(len(seen[rank]))
    return _measure(rank, middles[rank], reference, each, seen[rank], others, blur, least, "its peers")


def against_past(
    rank: int, seen: Spans, middles: Mapping[int, float], levels: Mapping[int, float], least: float
) -> Measure | None:
    """A rank beside its own past, corrected by how everybody changed. None where the past is not known."""
    known = [r for r in seen if levels.get(r, 0) > 0 and seen[r]]
    if rank not in known or len(known) < 2:
        return None
    reference = levels[rank] * statistics.median_low([middles[r] / levels[r] for r in known])
    each: dict[int, float] = {}
    for step in seen[rank] if middles[rank] > half(least) * reference else ():
        changes = [seen[r][step].own_s / levels[r] for r in known if step in seen[r]]
        each[step] = levels[rank] * statistics.median_low(changes)
    blur = BLUNT * math.sqrt(1 / len(seen[rank]) + 1 / LEARNT_STEPS)  # the level is a middle, too
    others = tuple(r for r in known if r != rank)
    return _measure(rank, middles[rank], reference, each, seen[rank], others, blur, least, "its own past")


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
    rank: int,
    middle: float,
    reference: float,
    each: Mapping[int, float],
    mine: Mapping[int, StepSpan],
    others: tuple[int, ...],
    blur: float,
    least: float,
    against: str,
) -> Measure:
    over = [mine[step].own_s > half(least) * usual for step, usual in each.items()]
    step_s = statistics.median(span.duration_s for span in mine.values())
    return Measure(rank, middle, reference, step_s, sum(over) / len(over) if over else 0.0, others, blur, against)


def _too_slow(m: Measure, noise: Noise, rule: Rule, least: float) -> bool:
    extra = m.own_s - m.reference_s
    if m.ratio < least or m.agree < rule.agree or extra < max(rule.impact * m.step_s, rule.least_s):
        return False
    return math.log(m.ratio) >= rule.sigmas * m.blur * noise.between(m.rank, m.others)


def _not_the_work(rank: int, slower: Collection[int], topology: Topology) -> bool:
    """False where a stage that spans machines got slower as a whole: then its work changed, not a machine."""
    stage = (rank, *topology.peers(rank))
    return any(r not in slower for r in stage) or len(topology.on(stage)) == 1


def _keeps_waiting(rank: int, peers: Mapping[int, Measure], topology: Topology, least: float) -> bool:
    """False where peers on other machines need about as long: nobody waits for it, and its past may have been learnt in a good moment."""
    elsewhere = any(topology.nodes[peer] != topology.nodes[rank] for peer in topology.peers(rank))
    return not elsewhere or rank not in peers or peers[rank].ratio > half(least)


def half(least: float) -> float:
    """Half of the way to the ratio that counts."""
    return 1 + (least - 1) / 2


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


def _everybody(middles: Mapping[int, float], steps: Sequence[int], levels: Mapping[int, float], rule: Rule) -> list[Verdict]:
    known = [(middle, levels[r]) for r, middle in middles.items() if levels.get(r, 0) > 0]
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
    for number, step in enumerate(steps):
        if number - len(slowest) > 0.2 * len(steps):
            return []  # too few can follow
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
