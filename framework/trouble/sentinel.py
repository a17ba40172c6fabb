"""Sentinel: reads the ranks' records from outside, and says what is wrong with whom.

    agents of the plan's nodes --rings--> Detector (fault_tolerance/detection/detector.py) --> verdicts, for the controller to take

A thread of its own, so that a node that does not answer never holds the controller up. While all is well it looks every other
step, while somebody is suspected of being slow after each; as soon as somebody stands still, is stopped or is under a verdict, twice a second. It spends at most a fiftieth of its
time, and a tenth while somebody is suspected: where judging takes long, it looks more rarely.

Rule of this file: it looks and remembers. What follows from a verdict is decided in `response.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from fault_tolerance.detection.deadlines import Patience
from fault_tolerance.detection.detector import SLOW, Detector, Settings
from fault_tolerance.detection.hangs import judge_hangs
from fault_tolerance.detection.stragglers import Rule
from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from framework.cluster.cluster import Remote, answers
from framework.config import DetectConfig
from framework.plan import Plan

LOOK_S, CALM_S = 0.5, 2.0  # the shortest and the longest pause
LOOK_STEPS = 2.0  # a straggler is named within ten, six to eight of which are the window that names it
ANSWER_S = 2.0
LEND_S = 10.0
SHARE = 0.02  # of the time, at most
SUSPECTS_SHARE = 0.1  # while somebody is suspected of being slow, which does not last


def settings_of(detect: DetectConfig) -> Settings:
    """What the config says, in the detector's terms; a look and a confirmation still fit before the hang deadline.

    An agent that answers late is no evidence: whether a machine is gone is asked of the machine itself.
    """
    deadline_s, long_s = 0.8 * detect.hang_timeout_s, max(detect.first_step_timeout_s, detect.hang_timeout_s)
    patience = Patience(
        floor_s=deadline_s,
        ceiling_s=deadline_s,
        steps=0.8 * detect.hang_steps,
        unlearnt_s=long_s,
        start_s=long_s,
        evaluate_s=long_s,
        checkpoint_s=long_s,
        compile_s=long_s,
    )
    more = detect.slow_ratio - 1  # what is sure to exceed it is found from well below it on
    return Settings(silent_s=math.inf, rule=Rule(ratio=1 + 0.6 * more, drift=1 + 0.27 * more), patience=patience)


def lend_rings(plan: Plan, agents: Mapping[str, Remote]) -> dict[int, str]:
    """Have every node lend memory for its ranks' records. A rank whose node cannot goes without."""
    calls = {n: agents[n].call("lend_rings", plan.generation, list(plan.ranks_on(n))) for n in plan.nodes if n in agents}
    return {rank: path for paths in answers(calls, LEND_S).values() for rank, path in paths.items()}


def record_at_once(plan: Plan, agents: Mapping[str, Remote]) -> bool:
    """Whether ranks record from the start. Not where some node is still building the recorder, as one that has just joined
    may be: the numbers of operations would differ, so all begin together as soon as it can.
    """
    calls = {n: agents[n].call("recorder_comes") for n in plan.nodes if n in agents}
    return not any(answers(calls, ANSWER_S).values())


def pause_s(step_s: float, spent_s: float, *, calm: bool, suspects: bool = False, look_s: float = LOOK_S) -> float:
    """Until the next look: by how long a step takes, whether there is anything to worry about, and what a look costs.

    While somebody is suspected of being slow, every step counts, and may cost more.
    """
    wanted = min(max(look_s, LOOK_STEPS * step_s), CALM_S) if calm else look_s
    if suspects and step_s > 0:
        wanted = min(wanted, step_s)
    return max(wanted, spent_s / (SUSPECTS_SHARE if suspects else SHARE))


class Sentinel:
    """Watches one crew. Thread-safe."""

    def __init__(self, plan: Plan, agents: Mapping[str, Remote], settings: Settings, *, look_s: float = LOOK_S) -> None:
        self._plan, self._agents, self._look_s = plan, dict(agents), look_s
        self._detector = Detector(Topology(plan.layout, plan.node_of_rank), settings)
        self._lock = threading.Lock()
        self._fresh: list[Verdict] = []
        self._standing: dict[tuple[object, ...], int] = {}
        self._moved: dict[int, tuple[int, float]] = {}
        self._calm, self._suspects = False, False
        self._over = threading.Event()
        self.failure = ""
        self._thread = threading.Thread(target=self._run, daemon=True, name="sentinel")
        self._thread.start()

    def take(self) -> list[Verdict]:
        """The verdicts that are new since the last call."""
        with self._lock:
            fresh, self._fresh = self._fresh, []
        return fresh

    def active(self) -> tuple[Verdict, ...]:
        """The verdicts that hold, those of two looks at least."""
        with self._lock:
            return tuple(v for key, v in self._detector.active.items() if self._standing.get(key, 0) >= 2)

    def still_s(self, now: float) -> dict[int, float]:
        """Seconds since something was last new in each recorded rank's ring; ranks without a record are not in it."""
        return {rank: max(0.0, now - at) for rank, (_, at) in self._moved.items()}  # a look may end after `now`

    @property
    def calm(self) -> bool:
        """Whether all records go on, and nobody is under a verdict or suspected of being slow."""
        return self._calm and not self._suspects and not self._fresh

    def pids(self) -> dict[int, int]:
        """The processes of the recorded ranks, on their nodes."""
        with self._lock:
            return {rank: ring.pid for rank, ring in self._detector.rings.items()}

    def explain(self) -> list[Verdict]:
        """What the records say now that the crew is known to be in trouble: a last look, without patience."""
        self._observe()
        with self._lock:
            detector = self._detector
            found = [v for v in detector.active.values() if v.kind in CERTAIN]
            return found or judge_hangs(detector.rings, detector.topology, lambda record: LEAST_WAIT_S)

    def work_changed(self, step: int, *, alike: bool) -> None:
        """After `step` ranks have other work than before (see `Detector.work_changed`)."""
        with self._lock:
            self._detector.work_changed(step, alike=alike)
            self._fresh = [v for v in self._fresh if v.kind not in SLOW]

    def computing_s(self) -> dict[int, float]:
        """Seconds that each rank computes in a step, waiting for nobody: the median of the newest; empty while unknown."""
        with self._lock:
            return self._detector.computing_s()

    @property
    def step_s(self) -> float:
        """Seconds of a step, the median of the newest; 0 while unknown."""
        with self._lock:
            return self._detector.usual_step_s

    def step_times(self, verdict: Verdict) -> tuple[float, float]:
        """Seconds of a step now, and without what a slow verdict names; zeros while unknown."""
        with self._lock:
            return self._detector.step_times(verdict)

    @property
    def reached(self) -> int:
        """The newest step that some rank had taken at the last look, by its record: whoever marks a step has taken the one before."""
        with self._lock:
            told = [ring.step for ring in self._detector.rings.values() if ring.generation == self._plan.generation]
        return max(told, default=1) - 1

    @property
    def topology(self) -> Topology:
        """Where every rank sits."""
        return self._detector.topology

    def close(self) -> None:
        """Stop looking."""
        self._over.set()

    def _run(self) -> None:
        pause = self._look_s
        while not self._over.wait(pause):
            try:
                spent_s = self._observe()
                pause = pause_s(self._detector.usual_step_s, spent_s, calm=self._calm, suspects=self._suspects, look_s=self._look_s)
            except Exception as error:  # a fault in judging must not end a run that trains; it is told once
                self.failure = f"{type(error).__name__}: {error}"
                return

    def _observe(self) -> float:
        """One look. Returns the seconds of processor time that it took."""
        calls = {n: a.call("read_rings", self._plan.generation) for n, a in self._agents.items() if n in self._plan.nodes}
        began = time.thread_time()  # waiting takes none of it
        read = answers(calls, ANSWER_S)
        rings: dict[int, bytes] = {rank: ring for of_node in read.values() for rank, ring in of_node.items()}
        with self._lock:
            fresh = self._detector.observe(rings)
            now = time.monotonic()
            heads = {rank: ring.head for rank, ring in self._detector.rings.items()}
            moved = {rank: (head, now) for rank, head in heads.items() if self._moved.get(rank, (-1, now))[0] != head}
            self._moved = self._moved | moved  # a new one: who reads it does not wait for a look
            holds = self._detector.active
            self._calm = not holds and len(moved) == len(self._detector.rings)
            self._suspects = self._detector.suspects
            self._standing = {key: self._standing.get(key, 0) + 1 for key in holds}
            self._fresh += fresh
        return time.thread_time() - began


CERTAIN = frozenset({Kind.CRASH, Kind.HANG, Kind.LINK_HANG, Kind.MISMATCH})
LEAST_WAIT_S = 1.0
