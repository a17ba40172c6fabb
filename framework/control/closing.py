"""Closing: the end of a run: the last state is saved and read once more, and there is a last word.

    finished, interrupted    save if that is wished, then a worker reads the whole state: its digest, text that it writes
    cannot go on             save the newest snapshot that is whole; say what is lost, what exists, and how to go on from it

A machine that is lost meanwhile is trouble like any other: it is returned, and the loop takes the state over once more.

Rule of this file: it saves and asks. What becomes of trouble is the controller's matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fault_tolerance.snapshots.catalogue import Snapshot
from framework.cluster.cluster import CallError, Cluster
from framework.config import Config
from framework.control.durable import Durable
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.control.memory import Memory
from framework.control.pool import Pool
from framework.control.watch import apart
from framework.plan import Plan
from parallel.atlas import TensorSpec

CLOSE_OUT_S = 600.0


class Closing:
    """The end of one run. `keep` writes down what became of snapshots and saves."""

    def __init__(
        self,
        config: Config,
        *,
        cluster: Cluster,
        journal: Journal,
        memory: Memory,
        durable: Durable,
        pool: Pool,
        specs: tuple[TensorSpec, ...],
        keep: Callable[[Plan], None],
    ) -> None:
        self._config, self._cluster, self._journal, self._memory = config, cluster, journal, memory
        self._durable, self._pool, self._specs, self._keep = durable, pool, specs, keep

    def close_out(self, status: str) -> dict[str, Any] | Trouble:
        """Save the last state if that is wished, and have a worker read it once more, whole.

        Returns what is to be said of it, or the trouble that came in between.
        """
        plan = self._journal.plan
        self._memory.look(self._pool.agents)
        snapshot = self._memory.snapshot
        if plan is None or snapshot is None or snapshot.step != self._journal.reached:
            return {}
        self._keep(plan)
        wish = self._config.fault_tolerance.durable
        wished = wish.at_end if status == "finished" else wish.on_signal
        unsaved = self._save(plan, snapshot.step) if wished else self._durable.finish()
        said = self._read_once_more(plan, snapshot, finished=status == "finished")
        if unsaved and wished:
            said["unsaved"] = f"the last state, of step {snapshot.step}, was not saved: {unsaved}"
        gone, lost = [node for node in plan.nodes if not self._cluster.confirm(node)], sorted(self._memory.lost)
        if not gone and not lost:
            return said
        evidence = "lost while the last state was saved"
        return apart(plan, gone, evidence, step=self._journal.reached, now=time.time(), nodes=lost)

    def last_word(self, error: Exception) -> str:
        """Why it cannot go on, what still exists, and how to go on from that."""
        self._salvage()
        kept = self._durable.newest()
        if kept is not None:
            return f"{error}; a checkpoint of step {kept.step} exists: go on with resume={kept.path}"
        return (
            f"{error}; no checkpoint exists: start again, with fault_tolerance.tolerate raised or "
            "fault_tolerance.durable.every_steps set"
        )

    def _salvage(self) -> None:
        """Save the newest snapshot that is whole, so that a run that cannot go on here can somewhere else."""
        plan, kept = self._journal.plan, self._durable.newest()
        self._memory.look(self._pool.agents)
        snapshot = self._memory.snapshot
        if plan is None or snapshot is None or snapshot.generation != plan.generation or snapshot.missing:
            return
        if snapshot.step > (kept.step if kept is not None else 0):
            self._save(plan, snapshot.step)

    def _save(self, plan: Plan, step: int) -> str:
        """After the save that is under way, if there is one. Returns why the state was not saved; empty if it was."""
        why = self._durable.finish()
        if not why:
            self._durable.begin(plan, step, self._pool.agents, self._specs)
            why = self._durable.finish() or self._durable.failure
        self._keep(plan)
        return why

    def _read_once_more(self, plan: Plan, snapshot: Snapshot, *, finished: bool) -> dict[str, Any]:
        """By whichever worker can."""
        reason = "no worker is left"
        for seat in plan.seats:
            remote = self._pool.workers.get(seat.worker)
            if remote is None or not self._cluster.confirm(seat.node):
                continue
            try:
                return dict(remote.call("close_out", snapshot.to_json(), finished).result(CLOSE_OUT_S))
            except (CallError, TimeoutError) as error:
                reason = str(error)
        self._journal.event("trouble", reason=f"the last state could not be read: {reason}", cause="close_out")
        return {}
