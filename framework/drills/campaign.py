"""Campaign: one run that goes through many losses, one after the other, and is judged after each.

    steady -> call for a cell's faults -> its nodes are dead -> a new step -> start them again -> steady: judge, write down
                                                                                                  -> the next cell

A run costs its start once, and every cell finds a crew that others have been lost from before: what is left behind by one
recovery meets the next one.

Rule of this file: it looks at a run as a stranger does, through its files and its cluster's control socket. What a cell is
and must show is in `framework/drills/matrix.py`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from framework import run_dir
from framework.cluster.machines import Machines
from framework.cluster.nodes import ClusterError
from framework.drills.faults import call
from framework.drills.matrix import Cell, faults, incidents_of, steady, wrong
from framework.drills.strikes import Hit, find_control, holding

LOOK_S = 0.05
AHEAD = 2  # steps from the call to the faults: every rank must have read of them by then
PATIENCE_S = 90.0  # for each part of a cell
FIRST_STEPS = 120  # what a cell may take in steps, before one was seen


class Campaign:
    """Takes the run of one driver through cells, from a thread of its own. Use it as a context; `found` has the verdicts, `under_way` the
    cell in which the run ended, if it did.

    `every_steps` is the interval of its snapshots. Ends when the cells are done, a cell fails, or too few steps are left for
    another one.
    """

    def __init__(
        self,
        driver: int,
        directory: Path,
        todo: Sequence[Cell],
        *,
        nodes: int,
        slots: int,
        tolerate: int,
        every_steps: int,
        num_steps: int,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._driver, self._directory, self._todo, self._tell = driver, directory, todo, tell
        self._nodes, self._slots, self._tolerate = nodes, slots, tolerate
        self._every_steps, self._num_steps = every_steps, num_steps
        self._told, self._written = run_dir.Tail(directory / "events.jsonl"), run_dir.Tail(directory / "metrics.jsonl")
        self._all_events: list[dict[str, Any]] = []
        self._counting: list[dict[str, Any]] = []
        self.control: str | None = None
        self.hits: list[Hit] = []
        self.found: list[dict[str, Any]] = []
        self.under_way: dict[str, Any] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="campaign")

    def __enter__(self) -> Campaign:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        if not self._until(lambda: self._seen_control() is not None):
            return
        machines, needed = Machines(str(self.control)), FIRST_STEPS
        for cell in self._todo:
            before = self._until(self._steady)
            if not before or self._num_steps - self._step() < needed:
                return
            step = self._step()
            try:
                row = self._cell(cell, before, machines)
            except ClusterError:
                return  # the run is over
            if row is None:
                return
            self.found.append(row)
            self.under_way = None
            self._tell(row)
            if not row["held"]:
                return
            needed = max(needed if len(self.found) > 1 else 0, 2 * (self._step() - step))

    def _cell(self, cell: Cell, nodes: Sequence[str], machines: Machines) -> dict[str, Any] | None:
        """One cell, from steady to steady. None when the run ended meanwhile, whatever the reason: nobody judges half a cell."""
        began, reached = time.time(), self._step()
        doomed = [nodes[place] for place in cell.places]
        generation = self._rows()[-1]["generation"]
        row = {"cell": str(cell), "layout": cell.layout, "time": began, "nodes": doomed, "run": self._directory.name, "from_step": reached}
        self.under_way = row
        call(self._directory / "drill", faults(cell, nodes, ranks_a_node=self._slots, step=reached + AHEAD))

        def verdict(*complaints: str) -> dict[str, Any] | None:
            if self._over.is_set():
                return None
            incidents = incidents_of(self._events(), began)
            lost = max((int(i["steps_lost"]) for i in incidents), default=0)
            kinds = [f"{i['kind']} {i['layout_before']}>{i['layout_after']} {i['tier']}" for i in incidents]
            seconds = {"cell_s": time.time() - began, "back_s": sum(i["total_s"] for i in incidents if i["kind"] != "resize")}
            return {**row, "held": not complaints, "holding": holding(self._driver), "wrong": list(complaints), "steps_lost": lost, "incidents": kinds, **seconds}

        if not self._until(lambda: all(self._state(machines).get(node) == "dead" for node in doomed)):
            return verdict(f"not all of {', '.join(doomed)} were killed within {PATIENCE_S:.0f} s: {self._state(machines)}")
        if not self._until(lambda: self._rows()[-1]["generation"] > generation):
            return verdict(f"no new step within {PATIENCE_S:.0f} s")
        for node in doomed:
            machines.launch(node)
        if not self._until(self._steady):
            return verdict(f"not grown back within {PATIENCE_S:.0f} s")
        return verdict(*wrong(self._events(), self._rows(), since=began, every_steps=self._every_steps))

    def _state(self, machines: Machines) -> dict[str, str]:
        with contextlib.suppress(ClusterError):
            return machines.names()
        return {}

    def _steady(self) -> tuple[str, ...]:
        events, rows = self._events(), self._rows()
        return steady(events, rows, layout=self._todo[0].layout, nodes=self._nodes, tolerate=self._tolerate)

    def _step(self) -> int:
        rows = self._rows()
        return int(rows[-1]["step"]) if rows else 0

    def _events(self) -> list[dict[str, Any]]:
        self._all_events += self._told.new()
        return self._all_events

    def _rows(self) -> list[dict[str, Any]]:
        """The rows that count so far."""
        for row in self._written.new():
            run_dir.enter(self._counting, row)
        return self._counting

    def _seen_control(self) -> str | None:
        self.control = self.control or find_control(self._driver)
        return self.control

    def _until(self, found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := found()):
            if self._over.is_set() or time.monotonic() > deadline:
                return value
            self._over.wait(LOOK_S)
        return value


def read(file: Path) -> list[dict[str, Any]]:
    """The verdicts that were written down so far."""
    return run_dir.Tail(file).new()


def write(file: Path, row: dict[str, Any]) -> None:
    """Add a verdict."""
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
