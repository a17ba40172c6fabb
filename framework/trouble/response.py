"""Response: what becomes of the sentinel's verdicts: an event each, and trouble where the crew cannot go on.

    verdict  ->  event `verdict` (class, place, evidence; of a hung rank its Python stack)
             ->  crash, hang, mismatch:   Trouble, when it has stood for two looks
             ->  a transfer that hangs:   the machines ask each other which way is dead (broken_ways.py)
    no step  ->                           so they do where nothing else tells why
             ->  slow:                    weighed (weighing.py), acted upon only where that pays; where replicas take
                                          unequal shares for it, that is watched (balancer.py)

What the controller finds by itself (a closed socket, no answer, no progress) is explained here by the records, so that the
trouble names who is at fault and not who suffers.

Rule of this file: it tells and asks; what the records mean is the detector's, what trouble means the controller's matter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fault_tolerance.detection.actions import Action, choose
from fault_tolerance.detection.balance import Shares
from fault_tolerance.detection.reachability import as_verdict
from fault_tolerance.detection.stacks import innermost, thread_first
from fault_tolerance.detection.verdict import NAMES_NOBODY, Kind, Verdict
from framework.cluster.cluster import CallError, Remote
from framework.config import Config
from framework.control.broken_ways import BrokenWays, Found
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.plan import Plan
from framework.trouble.balancer import Balancer
from framework.trouble.balancing import relief
from framework.trouble.log_watch import LogWatch
from framework.trouble.sentinel import Sentinel
from framework.trouble.weighing import AGAIN, Costs, Outlook, Tried, by_test, evicted, stuck_end, ways_out

TROUBLE = {Kind.CRASH: "crash", Kind.HANG: "hang", Kind.LINK_HANG: "hang", Kind.MISMATCH: "mismatch"}
SLOW = {Kind.SLOW_COMPUTE: "slow_compute", Kind.SLOW_LINK: "slow_link"}
ONSET_STEPS = 8  # a slow verdict has watched so many steps before it is one
TEST_S = 60.0
LOGS_S = 1.0
STACK_S = 6.0
STACK_CHARS = 6000
TRAINING = "_generation_of"  # a function below which a worker trains
UNEXPLAINED = ("hang", "crash")
APART_S = 5.0  # a crew gets together sooner, and takes a step sooner; else its machines ask each other, and again after twice as long
QUIET_STEPS = 4  # steps that a crew must have had time for


@dataclass(slots=True)
class Case:
    """Somebody slow: since which step, seen last in which, whether a test has confirmed it, when to test or to weigh again,
    what was said last, what had been lost before `since`, and what was seen at every look: how many times slower, and how long the slowest computed."""

    since: int
    seen: int = 0
    lost_s: float = 0.0
    severities: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    asked_s: float | None = None
    confirmed: Verdict | None = None
    test_at: int = 0
    weigh_at_s: float = 0.0
    said: str = ""


class Response:
    """One crew's verdicts. `without` tells what would become of the crew without a machine."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        plan: Plan,
        agents: Mapping[str, Remote],
        *,
        sentinel: Sentinel,
        request_test: Callable[[], None],
        request_shares: Callable[[Sequence[int]], None],
        without: Callable[[str], Outlook],
        costs: Costs,
        tried: Tried,
        ways: BrokenWays,
    ) -> None:
        self._config, self._journal, self._plan, self._agents = config, journal, plan, agents
        self._request_test, self._without, self._costs, self._tried = request_test, without, costs, tried
        self._balancer = Balancer(journal, sentinel, request=request_shares, tried=tried)
        self._cases: dict[tuple[object, ...], Case] = {}
        self._sentinel, self._ways = sentinel, ways
        self._began = time.monotonic()
        self._ask_after_s = APART_S
        self._logs = LogWatch(journal.logs, plan)
        self._told: set[tuple[object, ...]] = set()
        self._warned = False
        self._read_logs_at = 0.0

    def look(self) -> Trouble | None:
        """Write new verdicts down. Returns trouble that the records are sure of."""
        if self._sentinel.failure and not self._warned:
            self._warned = True
            self._journal.event("record", reason=f"the records are not judged any more: {self._sentinel.failure}")
        for verdict in self._sentinel.take():
            if verdict.kind in NAMES_NOBODY:
                self._journal.event("record", reason=verdict.reason, cause=str(verdict.kind), severity=verdict.severity)
            elif verdict.kind not in TROUBLE:
                self._tell(verdict)
        if time.monotonic() > self._read_logs_at:
            self._logs.poll(time.time())
            self._read_logs_at = time.monotonic() + LOGS_S
        active = self._sentinel.active()
        certain = [v for v in active if v.kind in TROUBLE and v.kind != Kind.CRASH]
        if certain:
            return self._charge(certain[0])
        apart = self._apart()
        if apart is not None:
            return apart
        slow = [v for v in active if v.kind in SLOW]
        over = [key for key, case in self._cases.items() if self._journal.reached - case.seen > 3 * ONSET_STEPS]
        for key in over:
            del self._cases[key]
        return next((t for v in slow if (t := self._weigh(v)) is not None), None) or self._tend()

    def heard(self, said: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Take what is meant for it, a pair test's figures, out of what the ranks have said; returns the rest."""
        rest = []
        for item in said:
            if item.get("event") != "pair_test":
                rest.append(self._shared(item) if item.get("event") == "shares" else item)
                continue
            for verdict in self._sentinel.active():
                case = self._cases.get(verdict.key)
                if case is not None and case.asked_s is not None:
                    self._tested(verdict, case, item)
        return rest

    def explained(self, trouble: Trouble) -> Trouble:
        """The trouble, with what the records add: who is at fault where nobody was named, and what it was doing."""
        if self._balancer.now is not None and "out of memory" in trouble.evidence.lower():
            self._tried.unequal[""] = f"a rank ran out of memory with unequal shares at step {trouble.step}"
        found = self._sentinel.explain() if trouble.kind in UNEXPLAINED else []
        named = next((v for v in found if v.kind in TROUBLE and (not trouble.ranks or set(v.ranks) & set(trouble.ranks))), None)
        if named is not None and not trouble.ranks and not trouble.nodes:
            return replace(self._charge(named), silent_s=trouble.silent_s)
        if trouble.kind in UNEXPLAINED and not trouble.ranks and not trouble.nodes:
            began = time.monotonic()
            found_dead = self._ways.examine(self._plan.nodes)
            trouble = replace(trouble, detected_at=time.time(), silent_s=trouble.silent_s + time.monotonic() - began)
            placed = self._on_ways(trouble, found_dead)
            if placed is not None:
                return placed
        self._tell(named or _as_verdict(trouble), stack=self._stack(trouble.ranks) if trouble.kind == "hang" else "")
        return trouble

    def likely(self) -> str:
        """The line in the ranks' logs that is likely the cause of what happened just now, or nothing."""
        return self._logs.likely(time.time())

    def still_s(self, now: float) -> dict[int, float]:
        """Seconds since anything was new in the record of each rank that has one."""
        return self._sentinel.still_s(now)

    @property
    def calm(self) -> bool:
        """Whether the records say nothing of anybody."""
        return self._sentinel.calm

    @property
    def reached(self) -> int:
        """The newest step that is known to have been taken, by the records of those who took it."""
        return self._sentinel.reached

    def close(self) -> None:
        """The crew has ended."""
        self._sentinel.close()

    def _tested(self, verdict: Verdict, case: Case, item: Mapping[str, Any]) -> None:
        case.asked_s, step = None, int(item["step"])
        case.confirmed = by_test(verdict, item["compute"], item["ways"], self._sentinel.topology)
        if case.confirmed is not None:
            return
        case.test_at = step + AGAIN * max(ONSET_STEPS, step - case.since)
        usual = sorted(item["compute"])[len(item["compute"]) // 2]
        seen = ", ".join(f"{seconds / usual:.2f}" for seconds in item["compute"])
        reason = f"{verdict.reason}; not confirmed by the pair test (computing takes {seen} of the median by rank): ignored"
        self._journal.event("verdict", reason=reason, action="ignore", confirmed=False, **as_fields(verdict))

    def _weigh(self, verdict: Verdict) -> Trouble | None:
        """What to do about somebody slow, now. None: nothing, or not yet."""
        now, reached = time.monotonic(), self._journal.reached
        case = self._cases.setdefault(verdict.key, Case(since=max(0, reached - ONSET_STEPS)))
        case.seen = reached
        case.severities.append(verdict.severity)
        case.longest_s = max([case.longest_s, *self._sentinel.computing_s().values()])
        if self._config.detect.action == "observe":
            return None
        if case.confirmed is None:
            waiting = case.asked_s is not None and now - case.asked_s < TEST_S
            if not waiting and reached >= case.test_at:
                case.asked_s = now
                self._request_test()
            return None
        if now < case.weigh_at_s:
            return None
        case.weigh_at_s = now + 1.0
        return self._chosen(replace(verdict, severity=statistics.fmean(case.severities)), case)

    def _chosen(self, verdict: Verdict, case: Case) -> Trouble | None:
        step_s, healthy_s = self._balancer.times(verdict) or self._sentinel.step_times(verdict)
        left = self._config.optim.num_steps - self._journal.reached
        if healthy_s <= 0 or left <= 0 or case.confirmed is None or self._balancer.settling(verdict):
            return None
        lost_s = case.lost_s + (step_s - healthy_s) * (self._journal.reached - case.since)
        node = evicted(case.confirmed)  # messages of the test cross one way each: it knows the place better
        shares = self._relief(verdict, step_s, healthy_s)
        options = ways_out(
            verdict, self._sentinel.topology, self._without(node), self._costs,
            step_s=step_s, healthy_s=healthy_s, reseated=node in self._tried.reseated, shares=shares,
        )  # fmt: skip
        choice = choose(options, step_s=step_s, healthy_step_s=healthy_s, steps_left=left, lost_s=lost_s)
        action = choice.action.name.lower()
        if action != case.said and not (choice.action is Action.IGNORE and self._balancer.now is not None):
            case.said = action
            none = [f"rebalance: no, {shares.reason}"] if shares is not None and not shares.samples else []
            self._journal.event(
                "verdict",
                reason=f"{verdict.reason}; confirmed: {case.confirmed.reason}; {choice.reason}",
                action=action,
                confirmed=True,
                comparison=[*choice.comparison, *none],
                **as_fields(verdict),
            )
        if choice.action is Action.REBALANCE and shares is not None:
            case.lost_s, case.since = lost_s, self._journal.reached
            self._balancer.begin(verdict, shares, before_s=step_s, healthy_s=healthy_s, longest_s=case.longest_s)
        if choice.action in (Action.IGNORE, Action.REBALANCE):
            return None
        if choice.action is Action.RESEAT:
            self._tried.reseated.add(node)
        evidence = f"{verdict.reason}; {choice.reason}"
        named_s = step_s * ONSET_STEPS  # until it was named; to act may take longer
        return Trouble(
            SLOW[verdict.kind], verdict.ranks, (node,), evidence, self._journal.reached, time.time(), named_s, remedy=action
        )

    def _relief(self, verdict: Verdict, step_s: float, healthy_s: float) -> Shares | None:
        """The shares that would suit; None where there is no question of any: a slow way, or they are unequal already."""
        if verdict.kind != Kind.SLOW_COMPUTE or self._balancer.now is not None:
            return None
        if why := self._tried.unequal.get(verdict.nodes[-1]) or self._tried.unequal.get(""):
            return Shares((), step_s, why)
        known = [verdict if v.key == verdict.key else v for v in self._sentinel.active() if (c := self._cases.get(v.key)) and c.confirmed and v.kind == verdict.kind]
        return relief(
            self._config, self._plan.layout, self._plan.num_microbatches, known or [verdict], step_s=step_s, healthy_s=healthy_s
        )

    def _shared(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """The ranks share the batch otherwise: of whom that is over, he is judged anew."""
        said, over = self._balancer.taken(item)
        if over is not None:
            self._cases.pop(over.key, None)
            self._told.discard(over.key)
        return said

    def _tend(self) -> Trouble | None:
        """Where shares are unequal for somebody: whether they still help, and whether something dearer pays by now."""
        self._balancer.look()
        now = self._balancer.now
        case = None if now is None else self._cases.get(now.verdict.key)
        if now is None or case is None:
            return None
        case.seen = self._journal.reached
        if time.monotonic() < case.weigh_at_s:
            return None
        case.weigh_at_s = time.monotonic() + 1.0
        return self._chosen(now.verdict, case)

    def _charge(self, verdict: Verdict) -> Trouble:
        stack = self._stack(verdict.ranks) if verdict.kind == Kind.HANG else ""
        if verdict.kind == Kind.LINK_HANG:
            found = self._ways.examine(self._plan.nodes)
            trouble = Trouble("hang", (), (), verdict.reason, self._journal.reached, time.time(), self._journal.quiet_s(0.0))
            placed = self._on_ways(trouble, found)
            if placed is not None:
                return placed
            asked = f"the machines asked each other: all of {len(found.asked)} ways work now"
            verdict = replace(verdict, evidence=(*verdict.evidence, *([asked] if found.asked else [])))
        self._tell(verdict, stack=stack)
        evidence = verdict.reason + (f"; it is in {innermost(stack)}" if stack else "")
        trouble = Trouble(
            TROUBLE[verdict.kind], verdict.ranks, verdict.nodes, evidence, self._journal.reached, time.time(), self._journal.quiet_s(0.0)
        )
        return self._between(verdict, trouble) if verdict.kind == Kind.LINK_HANG else trouble

    def _between(self, verdict: Verdict, trouble: Trouble) -> Trouble:
        """A way is stuck: neither end is killed for what lies between them, but one that keeps being stuck is left out."""
        first, last = verdict.link or (verdict.ranks[0], verdict.ranks[-1])
        self._tried.stuck.append((self._plan.seats[first].node, self._plan.seats[last].node))
        node = stuck_end(self._tried.stuck) if self._config.detect.action == "act" else None
        outlook = None if node is None else self._without(node)
        if node is None or outlook is None or outlook.ratio is None:
            return replace(trouble, ranks=(), nodes=())
        evidence = f"{trouble.evidence}; a way of {node} was stuck before, so it goes"
        return replace(trouble, ranks=(), nodes=(node,), evidence=evidence, remedy="swap" if outlook.spare else "shrink")

    def _apart(self) -> Trouble | None:
        """Whether the crew takes no step because a way between its machines is dead: it does not get together, or waits for a
        snapshot that cannot be sent. Its machines are asked meanwhile; a step that is only long is not disturbed by that.
        """
        found, quiet_s = self._ways.found(), self._journal.quiet_s(self._began)
        least_s = max(APART_S, QUIET_STEPS * self._journal.step_s)
        if quiet_s < least_s:
            self._ask_after_s = least_s
            return None
        if quiet_s > self._ask_after_s:
            self._ask_after_s = 2 * quiet_s
            self._ways.begin(self._plan.nodes)
        if found is None:
            return None
        evidence = f"the crew has taken no step for {quiet_s:.0f} s"
        return self._on_ways(Trouble("hang", (), (), evidence, self._journal.reached, time.time(), quiet_s), found)

    def _on_ways(self, trouble: Trouble, found: Found) -> Trouble | None:
        """The trouble with its place, if machines of this crew found ways between them dead."""
        dead = [d for d in found.dead if set(d.ends) <= set(self._plan.nodes)]
        if not dead:
            return None
        verdict = as_verdict(dead, found.asked, self._sentinel.topology, before=trouble.evidence)
        self._tell(verdict)
        return replace(trouble, nodes=verdict.nodes, evidence=verdict.reason, ways=tuple(d.ends for d in dead))

    def _tell(self, verdict: Verdict, *, stack: str = "") -> None:
        if verdict.key in self._told:
            return
        self._told.add(verdict.key)
        fields = as_fields(verdict)
        if verdict.kind in SLOW:
            fields["action"] = "observe" if self._config.detect.action == "observe" else "test"
        if stack:
            fields["stack"] = stack[:STACK_CHARS]
        self._journal.event("verdict", reason=verdict.reason, **fields)

    def _stack(self, ranks: Sequence[int]) -> str:
        """What the first of these ranks is doing; also kept beside the logs."""
        rank = next(iter(ranks), None)
        pid = self._sentinel.pids().get(rank) if rank is not None else None
        if rank is None or pid is None:
            return ""
        seat = self._plan.seats[rank]
        try:
            call = self._agents[seat.node].call("stack", pid, f"{self._journal.logs}/stacks_{seat.worker}.txt")
            stack = thread_first(str(call.result(STACK_S)), TRAINING)
        except (CallError, TimeoutError, KeyError) as error:
            return f"no stack: {error}"
        Path(self._journal.logs, f"g{self._plan.generation:03d}_r{rank:03d}_stack.txt").write_text(stack)
        return stack


def as_fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the fields of an event."""
    return {
        "cause": str(verdict.kind),
        "ranks": list(verdict.ranks),
        "nodes": list(verdict.nodes),
        "link": None if verdict.link is None else list(verdict.link),
        "severity": verdict.severity,
        "confidence": verdict.confidence,
        "evidence": list(verdict.evidence),
    }


def _as_verdict(trouble: Trouble) -> Verdict:
    """What the controller saw by itself, said in the same form."""
    kind = Kind(trouble.kind) if trouble.kind in set(Kind) else Kind.CRASH
    return Verdict(kind, trouble.ranks, trouble.nodes, str(trouble), evidence=(trouble.evidence,), confidence=0.9)
