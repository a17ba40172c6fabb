"""Faults on demand: real ones, at a chosen step and phase, for drills and tests.

    drill.faults: [{step: 12, kind: kill_node, node: node1, phase: backward}]

A fault fires once in the life of a run, however often its step is done again: whoever fires it first creates
`<run_dir>/drill/<index>` and nobody else can. Phases of a step, in order:

    forward  backward  optimizer  staging  encode  transfer      and  recovery: while state is being restored

`forward` and `backward` fire from a timer inside the pass (a tenth and seven tenths into the last one's duration),
`staging` just before that step's snapshot begins, `encode` when its copy should be done (one duration of the last copy
later) and `transfer` half as long after that, the others where their name says. Each is carried out by the victim itself; what happens to a node without a rank, by rank 0.

With `drill.on_call` faults may also be called for while the run goes on: a line of JSON, with the same keys, appended to
`<run_dir>/drill/calls.jsonl` (`call`). One that was called for fires at its step or at the first one after it.

    kind                                        severity
    kill_worker kill_node stop_worker raise     none
    hang                                        below 1: a collective is left out; else the GIL is held for ever
    slow_worker                                 how many times as long everything takes in its process, from then on
    poison flip_bit                             none; the pass's loss is no number, one bit of the rank's parameters flips
    slow_link                                   MB/s that the rank may send
    partition                                   seconds until the machine is there again
    preempt                                     seconds from the notice to the end of the machine
    add_node                                    none; a dead machine comes back, or a new one joins
    corrupt_block                               how many blocks of the node's vault get a flipped bit

Rule of this file: when and where. What happens then, to more than one process, is in `fault_acts.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.drills import fault_acts

CALLS = "calls.jsonl"
PHASES = ("forward", "backward", "optimizer", "staging", "encode", "transfer", "recovery")
KINDS = (
    "kill_worker", "kill_node", "stop_worker", "hang", "slow_worker", "slow_link", "partition", "preempt", "add_node",
    "corrupt_block", "raise", "poison", "flip_bit",
)  # fmt: skip
OF_A_SNAPSHOT = ("staging", "encode", "transfer")  # a step whose snapshot is left out has none of these: then at the next one
SHARES = {"forward": 0.1, "backward": 0.7, "encode": 1.0, "transfer": 1.5}  # when, in times of what is given as expected
FROM_AFAR = ("kill_node", "partition", "preempt", "add_node")  # another machine can do it to one that has no rank
INLINE = ("raise", "hang", "slow_worker", "poison", "flip_bit")  # carried out by the training thread itself


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
        if self.node is None and self.kind == "add_node":
            raise ValueError(f"drill.faults: add_node needs a node, got rank {self.rank}; for example node: n1")
        if self.step < 0:
            raise ValueError(f"drill.faults.step: must not be negative, got {self.step}")


class InjectedError(RuntimeError):
    """What the fault kind `raise` raises."""


def claim(directory: Path, index: int | str) -> bool:
    """True for the one caller who may fire fault `index`; the claim outlives that process."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(directory / str(index), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def call(directory: Path, faults: Sequence[Fault]) -> None:
    """Have faults fire in a run that goes on; `directory` is its `drill`. Its ranks learn of all of them at once."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(fault)) + "\n" for fault in faults)
    file = os.open(directory / CALLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, lines.encode())
    finally:
        os.close(file)


class FaultInjector:
    """The faults that may fire in this worker, armed for one generation.

    A fault given by `node` is fired by the node's lowest rank, because it takes the others with it; `slow_link` by all.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        directory: Path,
        rank: int,
        node: str,
        leads_node: bool,
        seated: Collection[str] = (),
        acts: Mapping[str, Callable[[Fault], None]] | None = None,
        on_call: bool = False,
    ) -> None:
        """`seated`: the nodes that have a rank. `acts`: what only the caller knows how to do, by kind. `on_call`: faults
        are also taken from the file of calls.
        """

        def here(fault: Fault) -> bool:
            if fault.node is None:
                return fault.rank == rank
            if fault.node == node:
                return leads_node or fault.kind == "slow_link"
            return rank == 0 and bool(seated) and fault.node not in seated and fault.kind in FROM_AFAR

        self._here = here
        self._poison = 0
        self._acts = _ACTS | {"poison": self._spoil} | dict(acts or {})
        self._directory, self._rank = directory, rank
        self._armed: list[tuple[int | str, Fault]] = []
        self._arm(enumerate(faults))
        self._calls, self._heard = directory / CALLS if on_call else None, (0, 0)

    def at(self, step: int, phase: str, *, expected_s: float = 0.0) -> None:
        """Fire what is due at this step and phase. `expected_s`: how long the pass, or the copy, that begins now should take."""
        self._listen()
        for index, fault in list(self._armed):
            late = fault.step < step and (isinstance(index, str) or phase in OF_A_SNAPSHOT)
            if fault.phase != phase or not (fault.step == step or late):
                continue
            self._armed.remove((index, fault))
            share = SHARES.get(phase)
            if share is None or fault.kind in INLINE:
                self._fire(index, fault)
            else:
                threading.Timer(share * expected_s, self._fire, (index, fault)).start()

    def poisoned(self) -> bool:
        """Whether the loss of the pass that has just ended is to be no number; each fault spoils one pass."""
        poisoned = self._poison > 0
        self._poison = max(0, self._poison - 1)
        return poisoned

    def recovering(self, reached: int) -> None:
        """Fire the faults of phase `recovery` whose step the run has reached before."""
        self._listen()
        for index, fault in list(self._armed):
            if fault.phase == "recovery" and fault.step <= reached:
                self._armed.remove((index, fault))
                self._fire(index, fault)

    def _arm(self, faults: Iterable[tuple[int | str, Fault]]) -> None:
        mine = [(i, f) for i, f in faults if self._here(f)]
        self._armed += [(i, f) for i, f in mine if not (self._directory / self._name(i, f)).exists()]

    def _listen(self) -> None:
        """Arm what has been called for since the last look."""
        if self._calls is None or not self._calls.exists() or self._calls.stat().st_size == self._heard[1]:
            return
        number, size = self._heard
        whole = self._calls.read_bytes()[size:].rpartition(b"\n")[0].splitlines()
        self._heard = number + len(whole), size + sum(len(line) + 1 for line in whole)
        self._arm((f"call{number + i}", Fault(**json.loads(line))) for i, line in enumerate(whole))

    def _name(self, index: int | str, fault: Fault) -> str:
        """What is claimed: the fault, or this rank's part of one that all ranks of a node carry out."""
        return f"{index}.{self._rank}" if fault.kind == "slow_link" and fault.node is not None else str(index)

    def _fire(self, index: int | str, fault: Fault) -> None:
        if not claim(self._directory, self._name(index, fault)):
            return
        self._acts[fault.kind](fault)

    def _spoil(self, _: Fault) -> None:
        self._poison += 1


def _kill_worker(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop_worker(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


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
    "kill_node": lambda fault: fault_acts.kill_node(fault.node),
    "partition": lambda fault: fault_acts.partition(fault.node, for_s=fault.severity),
    "preempt": lambda fault: fault_acts.preempt(fault.node, in_s=fault.severity),
    "add_node": lambda fault: fault_acts.add_node(str(fault.node)),
    "hang": _hang,
    "slow_worker": _slow_worker,
    "raise": _raise,
}
