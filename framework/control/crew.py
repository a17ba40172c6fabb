"""Crew: the connected workers of one plan, as the controller holds them.

    muster   agents and workers that are missing are started, those that live are kept
    start    every rank's call of `Worker.run` goes out
    look     what each rank says of itself, without waiting for those who say nothing
    abort    everybody out of the collectives; whoever is not out by the deadline is killed

Rule of this file: calls and their bookkeeping. It decides nothing (`watch.py` and `plan.py` do).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framework.cluster.cluster import Call, CallError, Remote, WorkerDied, WorkerUnavailable, tail, wait_all, wait_any
from framework.cluster.nodes import Exit
from framework.control.watch import Ended
from framework.plan import Plan

LAST_WORDS_S = 2.0
RARELY = 4  # times the usual period: who has told of its start and is seen to work is asked for little else
AT_WORK_S = 1.0  # a record that went on within that


@dataclass(slots=True)
class RankView:
    """What is known of one rank: its pending poll, its last words, how its call ended."""

    remote: Remote
    run: Call
    ping: Call | None = None
    asked: float = 0.0
    heard: float = 0.0
    progress: tuple[int, str] = (0, "start")
    ended: Ended | None = None
    outcome: dict[str, Any] | None = None
    acked: int = 0
    leaving: bool = False


@dataclass(slots=True)
class Crew:
    """The ranks of one plan and the agents of its nodes."""

    plan: Plan
    agents: Mapping[str, Remote]
    ranks: list[RankView]
    answers_s: deque[float]
    ping_period_s: float = 0.5
    began: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        """Whether every rank came to an end of its own, as planned."""
        return all(view.outcome is not None for view in self.ranks)

    def look(self, still_s: Mapping[int, float]) -> list[dict[str, Any]]:
        """Ask everybody whose turn it is, hear who has answered meanwhile. Returns the new rows and events of the ranks.

        `still_s`: seconds since each recorded rank's record last went on.

        A poll that is under way is never repeated, so a rank that hangs costs one pending call.
        """
        said: list[dict[str, Any]] = []
        under_way = [call for view in self.ranks for call in (view.run if view.ended is None else None, view.ping) if call is not None]
        ended = set(wait_all(under_way, 0.0)[0])
        for rank, view in enumerate(self.ranks):
            if view.ended is None and view.run in ended:
                self._close(rank, view)
            if view.ping is not None and view.ping in ended:
                said += self._hear(view, view.ping)
                view.ping = None
            now = time.monotonic()
            at_work = rank and view.acked and still_s.get(rank, AT_WORK_S) < AT_WORK_S  # rank 0 tells the steps
            if view.ended is None and view.ping is None and now - view.asked >= self.ping_period_s * (RARELY if at_work else 1):
                view.asked = now
                view.ping = view.remote.call("poll", view.acked)
        return said

    def wait(self, timeout_s: float) -> None:
        """Until a rank's call ends, which is how a dead process shows at once, or the time is over."""
        under_way = [view.run for view in self.ranks if view.ended is None]
        if under_way:
            wait_any(under_way, timeout_s)
        else:
            time.sleep(timeout_s)

    def last_words(self, gone: Collection[str] = ()) -> list[dict[str, Any]]:
        """What was still to come from ranks whose call has ended; waits a moment for all of them together, but not for who was on
        a machine that is gone.
        """
        there = (view for seat, view in zip(self.plan.seats, self.ranks, strict=True) if seat.node not in gone)
        open_views = [view for view in there if view.ended is None or view.ended.how != "died"]
        calls = {view.remote.call("poll", view.acked): view for view in open_views}
        answered, _ = wait_all(list(calls), LAST_WORDS_S)
        return [item for call in answered for item in self._hear(calls[call], call)]

    @property
    def slow_answer_s(self) -> float:
        """How long the slowest of the ranks' last answers took; a busy machine answers late, and is not dead."""
        return max(self.answers_s, default=0.0)

    def silent_s(self, now: float) -> dict[int, float]:
        """Seconds since each rank was last heard that has not come to an end of its own."""
        return {r: now - v.heard for r, v in enumerate(self.ranks) if v.ended is None or v.ended.how == "died"}

    def unanswered(self, now: float, longer_than_s: float) -> frozenset[int]:
        """The ranks that were asked so long ago and have not answered yet."""
        return frozenset(r for r, v in enumerate(self.ranks) if v.ping is not None and now - v.asked > longer_than_s)

    def progress(self) -> dict[int, tuple[int, str]]:
        """(step, phase) of each rank that still runs."""
        return {r: view.progress for r, view in enumerate(self.ranks) if view.ended is None}

    def leaving(self) -> frozenset[int]:
        """The ranks whose process was asked to leave."""
        return frozenset(r for r, view in enumerate(self.ranks) if view.leaving)

    def ended(self) -> dict[int, Ended]:
        """How the calls that have ended badly did so."""
        return {r: v.ended for r, v in enumerate(self.ranks) if v.ended is not None and v.outcome is None}

    def request_stop(self) -> None:
        """Ask the crew to end at the next step boundary, all ranks alike."""
        self._ask_all("request_stop")

    def request_hold(self) -> None:
        """Ask the crew to end at the next step boundary with its state in its own memory, for a vault of it is lost."""
        self._ask_all("request_hold")

    def request_snapshot(self) -> None:
        """Have the crew take a snapshot at the next step boundary."""
        self.ranks[0].remote.call("request_snapshot", self.plan.generation)

    def request_test(self) -> None:
        """Have the ranks measure each other at the next step boundary."""
        self.ranks[0].remote.call("request_test", self.plan.generation)

    def request_shares(self, shares: Sequence[int]) -> None:
        """Have replica i take `shares[i]` samples of a global batch from the next step on; empty: equally many."""
        self.ranks[0].remote.call("request_shares", self.plan.generation, list(shares))

    def abort(self, *, deadline_s: float, dead_nodes: frozenset[str]) -> tuple[int, ...]:
        """Throw everybody out of the collectives. Returns the ranks that had to be killed for it.

        Those on dead nodes are neither asked nor waited for.
        """
        for rank, view in enumerate(self.ranks):
            if view.ended is None and self.plan.seats[rank].node in dead_nodes:
                view.ended = Ended("died", "its machine is gone", time.monotonic())
        open_views = [(r, v) for r, v in enumerate(self.ranks) if v.ended is None]
        for _, view in open_views:
            view.remote.call("abort", self.plan.generation)
        deadline = time.monotonic() + deadline_s
        for rank, view in open_views:
            if view.run.wait(max(0.0, deadline - time.monotonic())):
                self._close(rank, view)
        stuck = [r for r, v in open_views if v.ended is None]
        for rank in stuck:
            self.kill(rank, agent_s=0.0 if self.plan.seats[rank].node in dead_nodes else 2.0)
        return tuple(stuck)

    def kill(self, rank: int, *, agent_s: float = 2.0) -> None:
        """SIGKILL a rank's process through its node's agent (a stopped process dies too), then tell Ray.

        `agent_s` is how long to wait for the agent; one on a node that is lost would not answer.
        """
        view, node = self.ranks[rank], self.plan.seats[rank].node
        pid = view.remote.pid
        if pid is not None and node in self.agents:
            self.agents[node].call("kill_pid", pid).wait(agent_s)
        view.remote.kill()
        if view.ended is None:
            view.ended = Ended("died", "killed: it was not out of the collectives by the deadline", time.monotonic())

    def _ask_all(self, method: str) -> None:
        for view in self.ranks:
            if view.ended is None:
                view.remote.call(method, self.plan.generation)

    def _hear(self, view: RankView, ping: Call, wait_s: float = 0.0) -> list[dict[str, Any]]:
        try:
            answer = ping.result(wait_s)
        except (CallError, TimeoutError):
            return []
        if answer["generation"] != self.plan.generation:
            view.heard = time.monotonic()
            return []
        view.heard, view.progress = time.monotonic(), tuple(answer["progress"])
        if view.asked:
            self.answers_s.append(view.heard - view.asked)
        view.leaving = bool(answer["leaving"])
        fresh = [item for number, item in answer["said"] if number > view.acked]
        view.acked = max([number for number, _ in answer["said"]], default=view.acked)
        return fresh

    def _close(self, rank: int, view: RankView) -> None:
        now = time.monotonic()
        try:
            result = view.run.result(0)
        except WorkerDied as error:
            view.ended = Ended("died", error.cause, now, node_lost=error.exit is Exit.NODE)
        except WorkerUnavailable as error:
            view.ended = Ended("died", error.cause, now)
        except CallError as error:
            view.ended = Ended("error", str(error), now)
        else:
            if result["how"] in ("finished", "stopped", "held", "diverged", "corrupt"):
                view.outcome = result
            view.ended = Ended(result["how"], result.get("evidence", ""), now)


def muster(
    plan: Plan,
    *,
    agents: Mapping[str, Remote],
    order: Mapping[str, Any],
    workers: Mapping[str, Remote],
    ping_period_s: float,
    answers_s: deque[float],
) -> Crew:
    """Send every rank to its seat. `workers` by worker id must hold a live one for every seat of the plan. `answers_s`: how long
    answers took in the crews before, and will in this one.
    """
    ranks = []
    for rank, seat in enumerate(plan.seats):
        remote = workers[seat.worker]
        ranks.append(RankView(remote, remote.call("run", {**order, "rank": rank}, lane="train"), heard=time.monotonic()))
    return Crew(plan, agents, ranks, answers_s, ping_period_s=ping_period_s)


def log_lines(paths: Sequence[str], lines: int = 5) -> str:
    """The last lines of some logs, for an error message."""
    return "\n".join(text for path in paths if (text := tail(path, lines)))
