"""A process that stages for some ranks as it is told, and may be killed: a worker's end of a snapshot, without a trainer.

It is forked from a server that has imported torch once, so that the next one starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from tests.fault_tolerance.snapshots.dying import WORKER_POINTS, die_in
from tests.fault_tolerance.snapshots.vaults import shards, whole_state

FORKS = multiprocessing.get_context("forkserver")


class WorkerProcess:
    """One such process. It says `ready`; then for each step it is told `begun`, `copied`, and the failures of its ranks."""

    def __init__(self, cluster: Any, plan: SnapshotPlan, ranks: Sequence[int], **options: Any) -> None:
        FORKS.set_forkserver_preload([__name__])
        self._ours, theirs = FORKS.Pipe()
        order = {"plan": plan.to_json(), "secret": cluster.secret, "ranks": list(ranks), **options}
        self.process = FORKS.Process(target=_stage, args=(theirs, order), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, step: int) -> None:
        """Stage a step."""
        self._ours.send(step)

    def hear(self) -> Any:
        """What it says next."""
        return self._ours.recv()

    def close(self) -> None:
        """SIGKILL, if it lives."""
        self.process.kill()
        self.process.join()
        self._ours.close()


def _stage(ours: Connection, order: dict[str, Any]) -> None:
    if "dies_at" in order:
        die_in(*WORKER_POINTS[order["dies_at"]], step=2)
    plan = SnapshotPlan.from_json(order["plan"])
    options = {"secret": order["secret"], "copy_bytes_s": order.get("copy_bytes_s")}
    snapshotters = [Snapshotter(plan, rank=rank, **options) for rank in order["ranks"]]
    ours.send("ready")
    while True:
        step = ours.recv()
        for s in snapshotters:
            s.begin(step, {"step": step}, shards(plan.atlas, s.rank, whole_state(plan.atlas, step)))
        ours.send("begun")
        for s in snapshotters:
            s.gate()
        ours.send("copied")
        time.sleep(0.2)
        ours.send([s.failure for s in snapshotters])
