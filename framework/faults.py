"""Faults on demand: real ones, at a chosen step and phase, for drills and tests.

    drill.faults: [{step: 12, kind: kill_node, node: node1, phase: backward}]

A fault fires once in the life of a run, however often its step is done again: whoever fires it first creates
`<run_dir>/drill/<index>` and nobody else can. Phases of a step, in order:

    forward  backward  optimizer  staging  encode  transfer      and  recovery: while state is being restored

`forward` and `backward` fire from a timer inside the pass (a tenth and seven tenths into the last one's duration),
`staging` just before that step's snapshot begins, `encode` and `transfer` as soon as it has, the others where their
name says. Each is carried out by the victim itself.

Rule of this file: it hurts processes, and knows nothing of training.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from framework.machines import Machines

PHASES = ("forward", "backward", "optimizer", "staging", "encode", "transfer", "recovery")
KINDS = ("kill_worker", "kill_node", "stop_worker", "hang", "slow_worker", "raise")


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of `drill.faults`. Exactly one of `rank` and `node` says where; `severity` depends on the kind."""

    step: int
    kind: str
    phase: str = "forward"
    rank: int | None = None
    node: str | None = None
    severity: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"drill.faults.kind: must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.phase not in PHASES:
            raise ValueError(f"drill.faults.phase: must be one of {', '.join(PHASES)}, got {self.phase!r}")
        if (self.rank is None) == (self.node is None):
            raise ValueError(f"drill.faults: exactly one of rank and node must be given, got {self}")
        if self.step < 0:
            raise ValueError(f"drill.faults.step: must not be negative, got {self.step}")


class InjectedError(RuntimeError):
    """What the fault kind `raise` raises."""


def claim(directory: Path, index: int) -> bool:
    """True for the one caller who may fire fault `index`; the claim outlives that process."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(directory / str(index), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


class FaultInjector:
    """The faults that may fire in this worker, armed for one generation.

    A fault given by `node` is fired by the node's lowest rank, because it takes the others with it.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        directory: Path,
        rank: int,
        node: str,
        leads_node: bool,
    ) -> None:
        mine = [(i, f) for i, f in enumerate(faults) if f.rank == rank or (f.node == node and leads_node)]
        self._armed = [(i, f) for i, f in mine if not (directory / str(i)).exists()]
        self._directory = directory

    def at(self, step: int, phase: str, *, expected_s: float = 0.0) -> None:
        """Fire what is due at this step and phase. `expected_s`: how long the pass that begins now should take."""
        for index, fault in list(self._armed):
            if fault.phase != phase or fault.step != step:
                continue
            self._armed.remove((index, fault))
            share = {"forward": 0.1, "backward": 0.7}.get(phase)
            if share is None or fault.kind in ("raise", "hang", "slow_worker"):
                self._fire(index, fault)
            else:
                threading.Timer(share * expected_s, self._fire, (index, fault)).start()

    def recovering(self, reached: int) -> None:
        """Fire the faults of phase `recovery` whose step the run has reached before."""
        for index, fault in list(self._armed):
            if fault.phase == "recovery" and fault.step <= reached:
                self._armed.remove((index, fault))
                self._fire(index, fault)

    def _fire(self, index: int, fault: Fault) -> None:
        if not claim(self._directory, index):
            return
        _ACTS[fault.kind](fault)


def kill_tree(root: psutil.Process) -> None:
    """SIGKILL a process and all below it, as a power cut would; the caller's own process comes last."""
    root.suspend()
    victims = [p for p in root.children(recursive=True) if p.pid != os.getpid()]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.suspend()
    for victim in [*victims, root]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def _kill_worker(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop_worker(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_node(_: Fault) -> None:
    """On an emulated machine its warden pulls the plug; on a real one all processes of this node's Ray are killed."""
    control, node = os.environ.get("HOLDFAST_CONTROL"), os.environ.get("HOLDFAST_NODE")
    if control and node:
        Machines(control).kill(node)
    raylet = next((p for p in psutil.Process().parents() if p.name() == "raylet"), None)
    if raylet is not None:
        kill_tree(raylet)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(fault: Fault) -> None:
    """severity < 1: sleep for ever (the collective is never called). Else hold the GIL for ever as well."""
    if fault.severity < 1:
        while True:
            time.sleep(3600)
    ctypes.PyDLL(None).pause()  # a PyDLL call keeps the GIL, so that no thread of this process answers any more


def _slow_worker(fault: Fault) -> None:
    """From now on this process gets 1/severity of the time, whatever it does: another one stops and continues it."""
    if fault.severity > 1:
        command = [sys.executable, "-S", "-E", "-c", _THROTTLE, str(os.getpid()), str(fault.severity)]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


_THROTTLE = """
import os, signal, sys, time
pid, times, period_s = int(sys.argv[1]), float(sys.argv[2]), 0.02
try:
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(period_s * (1 - 1 / times))
        os.kill(pid, signal.SIGCONT)
        time.sleep(period_s / times)
except ProcessLookupError:
    pass
"""


def _raise(fault: Fault) -> None:
    raise InjectedError(f"drill: fault raised on purpose at step {fault.step}, phase {fault.phase}")


_ACTS: dict[str, Callable[[Fault], None]] = {
    "kill_worker": _kill_worker,
    "stop_worker": _stop_worker,
    "kill_node": _kill_node,
    "hang": _hang,
    "slow_worker": _slow_worker,
    "raise": _raise,
}
