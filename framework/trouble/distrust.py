"""Distrust: which kept states are never used again, because one of them failed its proof or what they hold is not believed.

    a restore failed its proof      that snapshot, or checkpoint                               -> the next tier, or an older one
    state corrupt, numbers bad      everything that was captured after the last clean step     -> back to before it

Rule of this file: it asks and tells vaults and storage; what a crew made of a state is judged by its ranks (`integrity.py`,
`numeric_guard.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fault_tolerance.detection.verdict import Kind, Verdict
from framework.cluster.cluster import Remote
from framework.control.durable import Durable
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.control.memory import Memory
from framework.plan import Plan, Refused
from framework.trouble.response import as_fields


class Distrust:
    """Of one run, over its life. `agents` are those that live, by node."""

    def __init__(self, *, journal: Journal, memory: Memory, durable: Durable, agents: Mapping[str, Remote]) -> None:
        self._journal, self._memory, self._durable, self._agents = journal, memory, durable, agents
        self._rolled_back: set[int] = set()

    def failed(self, plan: Plan) -> None:
        """The state that a plan started from failed its proof: the same step and tier are never tried again."""
        if plan.source.tier == "memory":
            self._memory.reject_newest()
        elif plan.source.path is not None:
            self._durable.reject(plan.source.path)

    def roll_back(self, plan: Plan, outcome: Mapping[str, Any]) -> Trouble:
        """The state cannot be believed since step `clean`: what was kept after it is set aside. Raises Refused where that
        has been done before, or nothing older is left.
        """
        clean, how = int(outcome["clean"]), str(outcome["how"])
        ranks = tuple(outcome["ranks"])
        nodes = tuple(dict.fromkeys(plan.seats[rank].node for rank in ranks))
        what = "the training state is corrupt" if how == "corrupt" else "the numbers stayed bad although steps were left out"
        reason = f"{what}: {outcome['evidence']}; back to step {clean} or before"
        kind = Kind.CORRUPT if how == "corrupt" else Kind.NAN
        self._journal.event("verdict", reason=reason, **as_fields(Verdict(kind, ranks, nodes, reason)), action="roll_back")
        self._memory.look(self._agents)
        self._memory.reject_after(clean)
        while (saved := self._durable.newest()) is not None and saved.step > clean and saved.path is not None:
            self._durable.reject(saved.path)
        left = self._memory.snapshot is not None or self._durable.newest() is not None
        if not left or (how == "diverged" and clean in self._rolled_back):
            raise Refused(f"{reason}; nothing from before is left to go back to; see detect.max_skips, detect.digest_every")
        self._rolled_back.add(clean)
        return Trouble("nan", ranks, nodes, reason, self._journal.reached, time.time())
