"""Strikes: faults from outside a run, by a process that the run does not know, at moments it is not told of.

    Strike("step 7", 0.3, "kill_node", "n1")      0.3 s after the row of step 7 was written, n1 loses its power

    when     start | step N | <kind of event> N, the N-th of its kind in events.jsonl (plan, crew, trouble, snapshot, ...)
    kind     kill_worker n1.0   kill_agent n1   kill_node n1   kill_controller
             stop_node n1       wake_node n1    interrupt (SIGINT) and terminate (SIGTERM), which go to the driver

Strikes are carried out in order, each after its own moment. What was struck, and when by the calendar's clock, is kept: the
times that the run tells of its incidents are held against it.

Rule of this file: it looks at a run as a stranger does (its files, its processes) and hurts it. It judges nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from framework import run_dir
from framework.cluster.machines import CONTROL, Machines
from framework.cluster.nodes import ClusterError

KINDS = (
    "kill_worker", "kill_agent", "kill_node", "kill_controller", "stop_node", "wake_node", "interrupt", "terminate",
)  # fmt: skip
LOOK_S = 0.005


@dataclass(frozen=True, slots=True)
class Strike:
    """What to do to whom, `delay_s` after which moment."""

    when: str
    delay_s: float
    kind: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.target}".strip() + f" {self.delay_s:.2f} s after {self.when}"


@dataclass(frozen=True, slots=True)
class Hit:
    """A strike that was carried out: when (seconds since the epoch), and which processes it met. None: nobody was there."""

    strike: Strike
    at: float
    pids: tuple[int, ...]


def reached(directory: Path, when: str) -> bool:
    """Whether a run has come to a moment, by what it has written."""
    what, _, number = when.partition(" ")
    if what == "start":
        return True
    if what == "step":
        return any(row["step"] >= int(number) for row in run_dir.metric_rows(directory))
    return sum(event["kind"] == what for event in run_dir.events(directory)) >= int(number)


def drawn(seed: int, *, num_steps: int, nodes: int, slots: int, tolerate: int) -> tuple[Strike, ...]:
    """Strikes at random moments, the same for the same seed: no more machines than may be lost, and processes besides."""
    draw = random.Random(seed)
    names = [f"n{n}" for n in range(nodes)]
    doomed = draw.sample(names, draw.randint(1, tolerate))
    staying = [n for n in names if n not in doomed]
    found = [("kill_node", node) for node in doomed]
    found += [("kill_worker", f"{draw.choice(staying)}.{draw.randrange(slots)}") for _ in range(draw.randint(0, 2))]
    found += [("kill_controller", "")] * draw.randint(0, 1)
    draw.shuffle(found)
    steps = sorted(draw.randint(1, max(1, num_steps * 2 // 3)) for _ in found)
    return tuple(Strike(f"step {s}", round(draw.uniform(0.0, 1.5), 2), *what) for s, what in zip(steps, found, strict=True))


class Striker:
    """Carries strikes out on the run of one driver, from a thread of its own. Use it as a context."""

    def __init__(self, driver: int, directory: Path, strikes: Sequence[Strike]) -> None:
        self._driver, self._directory, self._strikes = driver, directory, strikes
        self.hits: list[Hit] = []
        self.control: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="striker")

    def __enter__(self) -> Striker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        self._wait(self._finds_control)
        for strike in self._strikes:
            self._wait(lambda strike=strike: reached(self._directory, strike.when))  # type: ignore[misc]
            self._over.wait(strike.delay_s)
            if self._over.is_set():
                return
            at = time.time()
            with contextlib.suppress(ClusterError, ProcessLookupError):  # it may be over, or somebody else was faster
                self.hits.append(Hit(strike, at, tuple(self._carry_out(strike))))

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not self._over.is_set() and not condition():
            self._over.wait(LOOK_S)

    def _finds_control(self) -> bool:
        self.control = self.control or find_control(self._driver)
        return self.control is not None

    def _carry_out(self, strike: Strike) -> Sequence[int]:
        match strike.kind:
            case "kill_worker":
                return self._signal(rf"(worker|g\d+_r\d+)_{re.escape(strike.target)}", signal.SIGKILL)
            case "kill_agent":
                return self._signal(f"agent_{re.escape(strike.target)}", signal.SIGKILL)
            case "kill_controller":
                return self._signal("controller", signal.SIGKILL)
            case "interrupt" | "terminate":
                os.kill(self._driver, signal.SIGINT if strike.kind == "interrupt" else signal.SIGTERM)
                return [self._driver]
        machines = Machines(str(self.control))
        return {"kill_node": machines.kill, "stop_node": machines.stop, "wake_node": machines.cont}[strike.kind](strike.target)

    def _signal(self, log: str, number: signal.Signals) -> list[int]:
        """To every process of the run that writes into the log of this name."""
        found = []
        for process in writing(self._driver, log):
            with contextlib.suppress(OSError):
                os.kill(process.pid, number)
                found.append(process.pid)
        return found


def writing(driver: int, log: str) -> list[psutil.Process]:
    """The processes of a driver's run whose output goes to a log of this name (a pattern)."""
    pattern = re.compile(rf".*/logs/{log}\.log")

    def output(process: psutil.Process) -> str:
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/{process.pid}/fd/1").readlink())
        return ""

    return [process for process in _descendants(driver) if pattern.fullmatch(output(process))]


def holding(driver: int) -> dict[str, int]:
    """What a driver's run has now: processes, and what its controller has open. What grows from loss to loss is a leak."""
    held = {"processes": len(_descendants(driver))}
    for process in writing(driver, "controller")[:1]:
        with contextlib.suppress(psutil.Error):
            held |= {"fds": process.num_fds(), "threads": process.num_threads(), "rss_mib": process.memory_info().rss >> 20}
    return held


def find_control(driver: int) -> str | None:
    """The socket of a run's local cluster, as its processes are told it."""
    for process in _descendants(driver):
        with contextlib.suppress(psutil.Error):
            if found := process.environ().get(CONTROL):
                return str(found)
    return None


def left_behind(control: str) -> tuple[str, ...]:
    """What there still is of a local cluster: its folders, and processes that belong to it."""
    folder = Path(control).parent
    found = [str(path) for path in (folder, Path("/dev/shm") / folder.name) if path.exists()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(CONTROL) == control and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} ({process.name()})")
    return tuple(found)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
