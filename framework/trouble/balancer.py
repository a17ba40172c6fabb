"""Balancer: has a crew take unequal shares, watches with `balancing.py` whether that helps, and takes it back.

Rule of this file: it asks the ranks and tells people; what is due is decided in `balancing.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fault_tolerance.detection.balance import Shares
from fault_tolerance.detection.verdict import Verdict
from framework.control.journal import Journal
from framework.trouble.balancing import Balancing, Due
from framework.trouble.sentinel import Sentinel
from framework.trouble.weighing import Tried


class Balancer:
    """One crew's shares. `now` is the stretch of unequal ones that is under way; `request(shares)` reaches all ranks, empty: alike."""

    def __init__(
        self, journal: Journal, sentinel: Sentinel, *, request: Callable[[Sequence[int]], None], tried: Tried
    ) -> None:
        self._journal, self._sentinel, self._request, self._tried = journal, sentinel, request, tried
        self.now: Balancing | None = None

    def begin(self, verdict: Verdict, shares: Shares, *, before_s: float, healthy_s: float, longest_s: float) -> None:
        """Have the replicas take these shares, for somebody is slow."""
        self.now = Balancing(verdict, shares, before_s, healthy_s, longest_s or before_s, time.monotonic())
        self._sentinel.work_changed(self._journal.reached, alike=False)  # ranks may take them before they have told of it
        self._request(shares.samples)

    def times(self, verdict: Verdict) -> tuple[float, float] | None:
        """(seconds of a step with unequal shares, if nobody were slow), of the slow one they are for; None for any other,
        and while they are not known.
        """
        now = self.now
        if now is None or now.ending or not now.after_s or verdict.key != now.verdict.key:
            return None
        return now.after_s, now.healthy_s

    def settling(self, verdict: Verdict) -> bool:
        """Whether it is not known yet what became of somebody slow, for whom shares were changed."""
        return self.now is not None and verdict.key == self.now.verdict.key and self.times(verdict) is None

    def taken(self, item: Mapping[str, Any]) -> tuple[Mapping[str, Any], Verdict | None]:
        """All ranks have taken new shares. Returns what they said of it, with why, and of whom it is over."""
        now, step, shares = self.now, int(item["step"]), tuple(item["shares"])
        self._sentinel.work_changed(step, alike=not shares)
        if now is None:
            return item, None
        if shares:
            now.since = step
            why = f"a step of {now.before_s:.3f} s should take {now.shares.step_s:.3f} s"
            return {**item, "reason": f"{item['reason']}; {why}", "before_s": now.before_s, "expected_s": now.shares.step_s}, None
        self.now = None
        return {**item, "reason": f"{item['reason']}; {now.why}"}, now.verdict

    def look(self) -> None:
        """Do what is due."""
        now = self.now
        if now is None:
            return
        match now.look(self._journal.reached, self._sentinel.computing_s(), self._sentinel.step_s, time.monotonic()):
            case Due.ASK:
                self._request(() if now.ending else now.shares.samples)
            case Due.TELL:
                self._journal.event("shares", reason=now.why, shares=list(now.shares.samples), after_s=now.after_s)
            case Due.ALIKE:
                if not now.helped:
                    self._tried.unequal[now.verdict.nodes[-1]] = now.why
                self._request(())
