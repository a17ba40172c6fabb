"""Telemetry: what is watched while a run goes on, handed to sinks that can neither slow nor stop it.

    step row, event --> [bounded queue] --> thread --> sink        one queue and one thread for each sink, so that
                    \\-> [bounded queue] --> thread --> sink        a slow one delays nobody, and a broken one is dropped

A full queue drops its newest entry and counts it; a sink that raises is opened again a few times, then given up with
one line. Names: `train/*` what is learnt, `perf/*` how fast, `mem/*` bytes, `sys/<node>/*` machines, `event/*`.

Rule of this file: the files of the run directory are written elsewhere, by whoever decides; here all is best effort.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

LOG = logging.getLogger("holdfast.telemetry")
QUEUE_SIZE = 1000
MAX_RESTARTS = 3
LOOK_S = 5.0  # an idle thread looks up so often
TOGETHER_S = 2.0  # what comes within that is handed on together, where nobody waits for the single row
_TRAIN = ("loss", "grad_norm", "lr", "tokens", "val_loss")
_PERF = ("step_time_s", "tokens_per_s", "mfu", "generation", "tolerance", "snapshot_stall_ms")


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of a step by full name (`train/loss`), and the row of `metrics.jsonl` they come from."""

    step: int
    values: Mapping[str, float]
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Happening:
    """A decision, as a row of `events.jsonl`."""

    row: Mapping[str, Any]


Entry = Numbers | Happening


class Sink(Protocol):
    """Where entries go. `open`, `write` and `close` are called from one thread of the sink's own: they may block or raise.

    `abandon` comes from another thread when `close` takes too long: let go of what the sink holds, now.
    """

    def open(self) -> None: ...

    def write(self, entry: Entry) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row under their full names; what is no number, or not finite, is left out."""
    prefixes = dict.fromkeys(_TRAIN, "train/") | dict.fromkeys(_PERF, "perf/")
    pairs = {(prefixes.get(key, "") + key): value for key, value in row.items() if key in prefixes or "/" in key}
    return {key: float(v) for key, v in pairs.items() if isinstance(v, int | float) and abs(v) < float("inf")}


class Telemetry:
    """Fans entries out to sinks. Every call returns at once; `close` waits no longer than it is told."""

    def __init__(self, sinks: Mapping[str, Sink], *, queue_size: int = QUEUE_SIZE, together_s: float = 0.0) -> None:
        """`together_s`: how long an entry may wait for those after it: a sink that is woken more rarely costs less."""
        self._lanes = {name: _Lane(name, sink, queue_size, together_s) for name, sink in sinks.items()}

    def step(self, row: Mapping[str, Any], more: Mapping[str, float] | None = None) -> None:
        """A step's row of `metrics.jsonl`, and further numbers under full names."""
        self._put(Numbers(int(row["step"]), named(row) | dict(more or {}), dict(row)))

    def event(self, row: Mapping[str, Any]) -> None:
        """A row of `events.jsonl`."""
        self._put(Happening(dict(row)))

    @property
    def dropped(self) -> dict[str, int]:
        """Entries that were lost, by sink; empty if none."""
        return {name: lane.dropped for name, lane in self._lanes.items() if lane.dropped}

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the sinks write what they have and end; those that have not by then are left behind."""
        deadline = time.monotonic() + timeout_s
        for lane in self._lanes.values():
            lane.finish()
        for lane in self._lanes.values():
            lane.join(max(0.0, deadline - time.monotonic()))

    def _put(self, entry: Entry) -> None:
        for lane in self._lanes.values():
            lane.put(entry)


class _Lane:
    """One sink with its queue and thread."""

    def __init__(self, name: str, sink: Sink, queue_size: int, together_s: float) -> None:
        self._name, self._sink, self._together_s = name, sink, together_s
        self._queue: queue.Queue[Entry | None] = queue.Queue(queue_size)
        self._ending = threading.Event()
        self.dropped = 0
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name=f"telemetry-{name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        self._ending.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread, if it waits

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            LOG.warning("telemetry: %s did not end in time and is left behind", self._name)
            self._try(self._sink.abandon)

    def _work(self) -> None:
        is_open = self._try(self._sink.open)
        while not (self._ending.is_set() and self._queue.empty()):
            try:
                entry = self._queue.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if entry is None:
                continue
            if self._together_s and self._queue.empty():
                self._ending.wait(self._together_s)
            if self._failures <= MAX_RESTARTS and not is_open:
                is_open = self._try(self._sink.open)
            if not is_open or not self._try(lambda entry=entry: self._sink.write(entry)):  # type: ignore[misc]
                self.dropped += 1
                is_open = False
        self._try(self._sink.close)

    def _try(self, call: Callable[[], None]) -> bool:
        """Run it; what it raises is the sink's own trouble, never the run's."""
        try:
            call()
        except Exception as error:
            self._failures += 1
            level = logging.WARNING if self._failures in (1, MAX_RESTARTS + 1) else logging.DEBUG
            given_up = ", given up" if self._failures > MAX_RESTARTS else ""
            LOG.log(level, "telemetry: %s failed%s: %s: %s", self._name, given_up, type(error).__name__, error)
            return False
        return True
