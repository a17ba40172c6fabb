"""Response: what becomes of the sentinel's verdicts: an event each, and trouble where the crew cannot go on.

    verdict  ->  event `verdict` (class, place, evidence; of a hung rank its Python stack)
             ->  crash, hang, mismatch:   Trouble, when it has stood for two looks
             ->  slow:                    weighed (weighing.py), acted upon only where that pays

What the controller finds by itself (a closed socket, no answer, no progress) is explained here by the records, so that the
trouble names who is at fault and not who suffers.

Rule of this file: it tells and asks; what the records mean is the detector's, what trouble means the controller's matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fault_tolerance.stacks import innermost, thread_first
from fault_tolerance.verdict import Kind, Verdict
from framework.cluster import CallError, Remote
from framework.config import Config
from framework.incident import Trouble
from framework.journal import Journal
from framework.plan import Plan
from framework.sentinel import Sentinel, settings_of

TROUBLE = {Kind.CRASH: "crash", Kind.HANG: "hang", Kind.LINK_HANG: "hang", Kind.MISMATCH: "mismatch"}
STACK_S = 6.0
STACK_CHARS = 6000
TRAINING = "_generation_of"  # a function below which a worker trains
UNEXPLAINED = ("hang", "crash")


class Response:
    """One crew's verdicts. `stacks` maps a worker to the file in which it lets its stacks be written."""

    def __init__(self, config: Config, journal: Journal, plan: Plan, agents: Mapping[str, Remote]) -> None:
        self._config, self._journal, self._plan, self._agents = config, journal, plan, agents
        self._sentinel = Sentinel(plan, agents, settings_of(config.detect))
        self._told: set[tuple[object, ...]] = set()
        self._warned = False

    def look(self) -> Trouble | None:
        """Write new verdicts down. Returns trouble that the records are sure of."""
        if self._sentinel.failure and not self._warned:
            self._warned = True
            self._journal.event("record", reason=f"the records are not judged any more: {self._sentinel.failure}")
        for verdict in self._sentinel.take():
            if verdict.kind not in TROUBLE:
                self._tell(verdict)
        certain = [v for v in self._sentinel.active() if v.kind in TROUBLE and v.kind != Kind.CRASH]
        return self._charge(certain[0]) if certain else None

    def explained(self, trouble: Trouble) -> Trouble:
        """The trouble, with what the records add: who is at fault where nobody was named, and what it was doing."""
        found = self._sentinel.explain() if trouble.kind in UNEXPLAINED else []
        named = next((v for v in found if v.kind in TROUBLE and (not trouble.ranks or set(v.ranks) & set(trouble.ranks))), None)
        if named is not None and not trouble.ranks and not trouble.nodes:
            return replace(self._charge(named), silent_s=trouble.silent_s)
        self._tell(named or _as_verdict(trouble), stack=self._stack(trouble.ranks) if trouble.kind == "hang" else "")
        return trouble

    def still_s(self, now: float) -> dict[int, float]:
        """Seconds since anything was new in the record of each rank that has one."""
        return self._sentinel.still_s(now)

    def close(self) -> None:
        """The crew has ended."""
        self._sentinel.close()

    def _charge(self, verdict: Verdict) -> Trouble:
        stack = self._stack(verdict.ranks) if verdict.kind == Kind.HANG else ""
        self._tell(verdict, stack=stack)
        evidence = verdict.reason + (f"; it is in {innermost(stack)}" if stack else "")
        whole = verdict.kind == Kind.LINK_HANG  # neither end is to be killed for what lies between them
        return Trouble(
            TROUBLE[verdict.kind],
            () if whole else verdict.ranks,
            () if whole else verdict.nodes,
            evidence,
            self._journal.reached,
            time.time(),
            self._journal.quiet_s(0.0),
        )

    def _tell(self, verdict: Verdict, *, stack: str = "") -> None:
        if verdict.key in self._told:
            return
        self._told.add(verdict.key)
        fields = as_fields(verdict)
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
