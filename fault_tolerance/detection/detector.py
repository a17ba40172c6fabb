"""Detector: rings of all ranks in, new verdicts out, again and again.

    watch = Detector(topology)
    every second:  for verdict in watch.observe({rank: ring_bytes, ...}): ...

    rings -> timelines, encounters -> deaths, mismatches, hangs   at once
                                   -> stragglers, links           on a window of steps, held for `persist` looks
                                   -> levels, deadlines, change points, learnt while nothing is wrong

Rule of this file: it remembers, the judging is done by pure functions. It reads no clock but those in the rings and the
`now_s` it is given, so a recorded run can be judged again.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from fault_tolerance.detection.changepoint import ChangePoints
from fault_tolerance.detection.deadlines import Deadlines, Patience
from fault_tolerance.detection.encounters import Encounters
from fault_tolerance.detection.hangs import judge_deaths, judge_hangs
from fault_tolerance.detection.links import Delay, Ends, could_be_slow, judge_links, levels, normalised
from fault_tolerance.detection.stragglers import (
    LEARNT_STEPS,
    Rule,
    against_past,
    judge_stragglers,
    last_step,
    middle_s,
    waits_caused,
)
from fault_tolerance.detection.timeline import StepSpan, meetings, merge, spans, ticket_of
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from parallel.record import Op, Phase, Record, Ring, State, decode

SLOW = frozenset({Kind.SLOW_COMPUTE, Kind.SLOW_LINK, Kind.SLOW_ALL, Kind.WANDERING})
KEPT_STEPS = 200
CLIP = 3.0  # a single sample says no more than this
JUDGED_STEPS = 64  # of those, no judgement of stragglers asks for older ones
KEPT_RECORDS = 4096, 2048, 16  # of a rank: as soon as there are more than the first, the second or those of so many steps are kept


@dataclass(frozen=True, slots=True)
class Settings:
    """`warm_up_steps` are not judged; `learn_steps` after them tell what is usual; a slow verdict must hold for
    `persist` windows that differ; a stopped process is named after `stopped_s`, an unreadable machine after `silent_s`."""

    warm_up_steps: int = 3
    learn_steps: int = LEARNT_STEPS
    persist: int = 3
    stopped_s: float = 1.0
    silent_s: float = 4.0
    rule: Rule = Rule()
    patience: Patience = Patience()


class Detector:
    """Names what is wrong with the ranks of one crew. Make a new one for the next generation."""

    def __init__(self, topology: Topology, settings: Settings | None = None) -> None:
        self.topology = topology
        self.settings = settings or Settings()
        self.rings: dict[int, Ring] = {}
        self.active: dict[tuple[object, ...], Verdict] = {}
        self.deadlines = Deadlines(self.settings.patience, warm_up_steps=self.settings.warm_up_steps)
        self._spans: dict[int, dict[int, StepSpan]] = defaultdict(dict)
        self._judgeable_spans: dict[int, dict[int, StepSpan]] = {}
        self._encounters = Encounters(topology)
        self._learnt_ticket: dict[int, int] = {}
        self._done_ticket: dict[int, int] = {}
        self._heard_s: dict[int, float] = {}
        self._levels: dict[int, float] = {}
        self._link_levels: dict[tuple[Ends, Hashable], float] = {}
        self._series: dict[int, ChangePoints] = {}
        self._drifted: dict[int, float] = {}
        self._fed = -1
        self._held: dict[tuple[object, ...], set[int]] = defaultdict(set)
        self._held_others: dict[tuple[object, ...], set[int]] = defaultdict(set)
        self._judged_step = -1
        self._stopped_at: dict[int, int | None] = {}
        self._since = -1
        self._alike = True

    def work_changed(self, step: int, *, alike: bool) -> None:
        """After `step` ranks have other work than before: what was learnt of their speed is of no use. Unless those of a
        stage have all `alike` much of it, nothing is said of how long they compute.
        """
        self._since, self._alike, self._fed, self._judged_step = step, alike, step, max(step, self._judged_step)
        self._judgeable_spans.clear()
        for learnt in (self._levels, self._link_levels, self._series, self._drifted, self._held, self._held_others):
            learnt.clear()  # type: ignore[attr-defined]
        self.active = {key: v for key, v in self.active.items() if v.kind not in SLOW}

    def observe(self, rings: Mapping[int, bytes | Ring | None], *, now_s: float | None = None) -> list[Verdict]:
        """Take in what could be read of the ranks' rings; return the verdicts that are new since the last call.

        A missing rank, or None, means that its ring could not be read; empty bytes that it was, and its rank has not begun
        it. All verdicts that hold now are in `active`.
        """
        now = time.monotonic() if now_s is None else now_s
        self._take(rings, now)
        self._learn()
        certain = self._gone(now) or self._desynchronised() + judge_deaths(self.rings, self.topology)
        certain = certain or self._stopped() or self._hung(now)
        found = {v.key: v for v in (certain or self._slow())}
        fresh = [v for key, v in found.items() if key not in self.active]
        self.active = found
        return fresh

    @property
    def step(self) -> int:
        """The newest step that any rank has begun."""
        return max((ring.step for ring in self.rings.values()), default=0)

    @property
    def suspects(self) -> bool:
        """Whether somebody is slow in the newest windows, though not in enough of them yet."""
        return any(self._held.values()) or any(self._held_others.values())

    @property
    def usual_step_s(self) -> float:
        """The median of the newest steps of some rank; 0 while there is none."""
        known = next(iter(self._spans.values()), {})
        recent = [span.duration_s for span in list(known.values())[-self.settings.rule.window :]]
        return statistics.median(recent) if recent else 0.0

    def computing_s(self) -> dict[int, float]:
        """Each rank's own time in a step, the median of the newest window; empty until there is one of all ranks."""
        window = self.settings.rule.window
        own = {rank: [s.own_s for _, s in sorted(self._judgeable(rank).items())[-window:]] for rank in self.rings}
        if not own or any(len(values) < window for values in own.values()):
            return {}
        return {rank: statistics.median(values) for rank, values in own.items()}

    def step_times(self, verdict: Verdict) -> tuple[float, float]:
        """(seconds of a step now, seconds it would take without what a slow verdict names)."""
        window = self.settings.rule.window
        recent = {r: [s.duration_s for _, s in sorted(self._judgeable(r).items())[-window:]] for r in self.rings}
        own = {r: [s.own_s for _, s in sorted(self._judgeable(r).items())[-window:]] for r in verdict.ranks if r in self.rings}
        times = [statistics.median(values) for values in recent.values() if values]
        if not times or not any(own.values()):
            return 0.0, 0.0
        now_s = statistics.median(times)
        worst = max(statistics.median(values) for values in own.values() if values)
        extra_s = worst * (1 - 1 / max(verdict.severity, 1.0))
        if verdict.kind == Kind.SLOW_LINK:
            extra_s = now_s - min(now_s, self._usual_s())
        return now_s, max(now_s - extra_s, 0.1 * now_s)

    def _usual_s(self) -> float:
        """The median step of the time when levels were learnt."""
        learnt = [s.duration_s for s in list(self._judgeable(min(self.rings)).values())[: self.settings.learn_steps]]
        return statistics.median(learnt) if learnt else 0.0

    def _take(self, rings: Mapping[int, bytes | Ring | None], now: float) -> None:
        for rank, given in rings.items():
            if given is None:
                continue
            self._heard_s[rank] = now
            if given:
                ring = given if isinstance(given, Ring) else decode(given)
                self.rings[rank] = _shortened(merge(self.rings.get(rank), ring))
                self._encounters.take(rank, ring)
        if self.rings:
            self._encounters.forget(self._newest - max(self.settings.learn_steps, self.settings.rule.window) - 1)

    # ---- learning ----

    def _learn(self) -> None:
        for rank, ring in self.rings.items():
            since = self._learnt_ticket.get(rank, -1)
            fresh = list(ring.records[bisect_right(ring.records, since, key=ticket_of) :])
            settled = _settled(fresh)
            if settled:
                self.deadlines.learn(r for r in settled if r.step >= self.settings.warm_up_steps)
                self._note_done(rank, since, settled)
                self._learnt_ticket[rank] = settled[-1].ticket
            known = self._spans[rank]
            newest = next(reversed(known), -1)  # they are in the order of steps
            if any(r.op == Op.MARK for r in fresh) or not known:
                fresh_spans = {s: span for s, span in spans(_tail(ring, newest), since_step=newest).items() if s >= newest}
                known.update(fresh_spans)
                self._judgeable_spans.pop(rank, None)
                for step in fresh_spans:
                    if step > newest:
                        self.deadlines.learn_step(step, known[step].duration_s)
            while len(known) > KEPT_STEPS:
                del known[next(iter(known))]
        if not self._levels:
            self._learn_levels()
        self._feed_series()

    def _judgeable(self, rank: int) -> dict[int, StepSpan]:
        """The finished steps after the warm-up, in their order."""
        if rank not in self._judgeable_spans:
            known = self._spans[rank]
            first = max(next(iter(known), 0), self._since + 1) + self.settings.warm_up_steps
            self._judgeable_spans[rank] = {s: span for s, span in known.items() if s >= first}
        return self._judgeable_spans[rank]

    def _note_done(self, rank: int, since: int, settled: Sequence[Record]) -> None:
        """Remember up to which ticket all has ended well: no wait is looked for there again."""
        if self._done_ticket.get(rank, -1) == since:
            failed = next((at for at, record in enumerate(settled) if record.state is not State.DONE), len(settled))
            self._done_ticket[rank] = settled[failed - 1].ticket if failed else since

    def _learn_levels(self) -> None:
        own = {rank: [s.own_s for s in self._judgeable(rank).values()] for rank in self.rings}
        if own and all(len(values) >= self.settings.learn_steps for values in own.values()):
            self._levels = {
                rank: statistics.median(values[: self.settings.learn_steps]) for rank, values in own.items()
            }
            self._link_levels = levels(self._delays(self.settings.learn_steps))

    def _feed_series(self) -> None:
        """Each rank's own time against everybody's, into its change points."""
        if not self._levels:
            return
        usable = {rank: self._judgeable(rank) for rank in self._levels if rank in self.rings}
        common = set.intersection(*(set(_after(u, self._fed)) for u in usable.values())) if usable else set()
        for step in sorted(common):
            self._fed = step
            changes = {r: max(u[step].own_s / max(self._levels[r], 1e-6), 1 / CLIP) for r, u in usable.items()}
            everybody = statistics.median_low(list(changes.values()))
            for rank, change in changes.items():
                series = self._series.setdefault(rank, _series(self.settings.rule.drift - 1))
                found = series.add(min(CLIP, max(1 / CLIP, change / everybody)))
                if found is not None:
                    self._drifted[rank] = self._drifted.get(rank, 1.0) * found.ratio

    # ---- judging ----

    def _gone(self, now: float) -> list[Verdict]:
        """Machines none of whose rings can be read any more; one that was never read may not have begun."""
        out = []
        for node in dict.fromkeys(self.topology.nodes):
            ranks = [r for r in self.topology.ranks_of(node) if r in self._heard_s]
            if not ranks:
                continue
            silent = min(now - self._heard_s[r] for r in ranks)
            elsewhere = [now - self._heard_s[r] for r in self._heard_s if r not in ranks]
            if silent >= self.settings.silent_s and elsewhere and min(elsewhere) < silent / 2:
                reason = f"{node} cannot be read for {silent:.1f} s, the others can: it is gone or cut off"
                out.append(Verdict(Kind.NODE_LOSS, self.topology.ranks_of(node), (node,), reason, confidence=0.9))
        return out

    def _stopped(self) -> list[Verdict]:
        """Processes that were stopped at this look and the one before, and did nothing in between: one that is stopped and
        continued again and again is slow, not hung."""
        out = []
        for rank, ring in sorted(self.rings.items()):
            last = max((max(r.call_ns, r.end_ns) for r in ring.records[-8:]), default=ring.mark_ns)
            silent = (ring.read_ns - last) / 1e9
            was, self._stopped_at[rank] = self._stopped_at.get(rank), ring.cpu_ns if ring.process == "T" else None
            if ring.process == "T" and was == ring.cpu_ns and silent >= self.settings.stopped_s:
                reason = f"rank {rank} on {self.topology.nodes[rank]} is stopped since {silent:.1f} s (SIGSTOP, or a debugger)"
                out.append(Verdict(Kind.HANG, (rank,), self.topology.on([rank]), reason, confidence=0.98))
        return out

    def _hung(self, now: float) -> list[Verdict]:
        unread = [rank for rank, at in self._heard_s.items() if at < now]
        return judge_hangs(self.rings, self.topology, self.deadlines.of, unread=unread, done=self._done_ticket)

    def _desynchronised(self) -> list[Verdict]:
        return self._encounters.mismatches(self._newest)

    def _slow(self) -> list[Verdict]:
        seen = {rank: self._judgeable(rank) for rank in self.rings}
        if not seen or not all(seen.values()):
            return []
        newest = last_step(seen)
        if newest == self._judged_step:
            return [v for v in self.active.values() if v.kind in SLOW]
        first = max(self._judged_step + 1, newest - self.settings.persist + 1)
        self._judged_step = newest
        computing: list[Verdict] = []
        general: list[Verdict] = []
        found: list[Verdict] = []
        for step in range(first, newest + 1):  # more than one, where steps are short against the time between two looks
            until = {rank: _until(spans, step) for rank, spans in seen.items()}
            if all(until.values()) and self._alike:
                general = judge_stragglers(until, self.topology, levels=self._levels, rule=self.settings.rule)
                found = [self._with_waits(v) for v in general if v.kind == Kind.SLOW_COMPUTE]
                computing = self._persistent(found, step, self._held)
        others = [] if computing else (not found and self._links()) or general or (self._alike and self._drift()) or []
        return computing or self._persistent([v for v in others if v.kind in SLOW], newest, self._held_others)

    def _links(self) -> list[Verdict]:
        rule = self.settings.rule
        samples = self._delays(rule.window)
        lasted = sum(span.duration_s for span in list(self._judgeable(min(self.rings)).values())[-rule.window :])
        least_s = 2 * rule.impact * lasted
        if not could_be_slow(samples, least_s):
            return []
        return judge_links(normalised(samples, self._link_levels), self.topology, least_s=least_s)

    def _delays(self, num_steps: int) -> list[Delay]:
        first = self.settings.warm_up_steps + max(min((next(iter(s)) for s in self._spans.values() if s), default=0), self._since + 1)
        return self._encounters.delays(self._newest - num_steps, first)

    def _drift(self) -> list[Verdict]:
        """Small but certain: a change point that no window would show, as long as it lasts and costs something."""
        rule, out = self.settings.rule, []
        drifted = [rank for rank, ratio in sorted(self._drifted.items()) if ratio >= rule.drift]
        if not drifted:
            return []
        seen = {rank: dict(list(self._judgeable(rank).items())[-2 * rule.window :]) for rank in self.rings}
        middles = {rank: middle_s(mine) for rank, mine in seen.items() if mine}
        for rank in drifted:
            m = against_past(rank, seen, middles, self._levels, rule.drift)
            extra_s = m.own_s - m.reference_s if m else 0.0
            if m and m.ratio >= rule.drift and m.agree >= 0.7 and extra_s >= rule.impact * m.step_s:
                nodes = self.topology.on([rank])
                reason = f"rank {rank} on {nodes[0]} drifted to {m.ratio:.2f} times its own past, others did not"
                out.append(Verdict(Kind.SLOW_COMPUTE, (rank,), nodes, reason, confidence=0.7, severity=m.ratio))
        return out

    def _persistent(
        self, found: Iterable[Verdict], newest: int, held: dict[tuple[object, ...], set[int]]
    ) -> list[Verdict]:
        """Those that held for `persist` windows that end in different steps."""
        kept = []
        now = {v.key: v for v in found}
        for key in [k for k in held if k not in now]:
            del held[key]
        for key, verdict in now.items():
            held[key].add(newest)
            if len(held[key]) >= self.settings.persist:
                kept.append(verdict)
        return kept

    def _with_waits(self, verdict: Verdict) -> Verdict:
        waits = waits_caused(meetings(self._recent(self.settings.rule.window)).values())
        lines = tuple(
            f"rank {r} made others wait {waits[r][0]:.2f} s and waited {waits[r][1]:.2f} s"
            for r in verdict.ranks
            if r in waits
        )
        return replace(verdict, evidence=verdict.evidence + lines)

    def _recent(self, num_steps: int) -> dict[int, Ring]:
        """The rings, cut to the records of the newest steps."""
        return {rank: _tail(ring, self._newest - num_steps) for rank, ring in self.rings.items()}

    @property
    def _newest(self) -> int:
        """The newest step that all ranks have begun."""
        return min((ring.step for ring in self.rings.values()), default=0)


def _series(least: float) -> ChangePoints:
    """Patient: what is large is found by the window long before; a false alarm here would cost a machine."""
    return ChangePoints(learn=16, least=least, settle=8, sure=0.95, sigmas=6.0)


def _settled(records: list[Record]) -> list[Record]:
    """Up to the first operation that is still open."""
    for at, record in enumerate(records):
        if record.state == State.CALLED:
            return records[:at]
    return records


def _after(by_step: dict[int, StepSpan], step: int) -> list[int]:
    """The steps after one, of steps in their order."""
    return list(takewhile(lambda s: s > step, reversed(by_step)))


def _until(by_step: dict[int, StepSpan], step: int) -> dict[int, StepSpan]:
    """The newest steps up to one, as many as are judged, of steps in their order."""
    steps = list(by_step)
    stop = bisect_right(steps, step)
    return {s: by_step[s] for s in steps[max(0, stop - JUDGED_STEPS) : stop]}


def _shortened(ring: Ring) -> Ring:
    """The ring without records that no judgement asks for, once there are many."""
    most, least, steps = KEPT_RECORDS
    if len(ring.records) <= most:
        return ring
    old = bisect_left(ring.records, ring.step - steps, key=lambda record: record.step)
    return replace(ring, records=ring.records[min(old, len(ring.records) - least) :])


def _tail(ring: Ring, step: int) -> Ring:
    """The ring without what is older than a step."""
    records = ring.records
    at = len(records)
    while at > 0 and (records[at - 1].step >= step or records[at - 1].phase != Phase.TRAIN):
        at -= 1
    return replace(ring, records=records[at:])
