"""A rank's part in `benchmarks/relayout.py`: its state into the vaults, and out of them under another layout.

Rule of this file: a rank measures; what it means is said by the one who started it.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.restore import Reader, share
from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from parallel.atlas import Atlas, Piece

PROTECT_S = 120.0


class Stage:
    """Copies this rank's state to its node's vault, once a round."""

    def __init__(self, job: dict[str, Any], rank: int, held: dict[Piece, Tensor]) -> None:
        self._snapshotter = Snapshotter(SnapshotPlan.from_json(job["plan"]), rank=rank, secret=bytes.fromhex(job["secret"]))
        self._held, self._step = held, 0

    def save(self) -> float:
        """The stall is what the gate before an update would wait for if it came at once: the whole copy."""
        snapshotter, deadline = self._snapshotter, time.monotonic() + PROTECT_S
        self._step += 1
        while not snapshotter.ready():
            time.sleep(0.001)
        start = time.perf_counter()
        snapshotter.begin(self._step, {"step": self._step}, self._held)
        snapshotter.gate()
        stall = time.perf_counter() - start
        while snapshotter.protected != self._step:
            if snapshotter.failure or time.monotonic() > deadline:
                raise RuntimeError(f"the snapshot is not protected: {snapshotter.failure or 'too slow'}")
            time.sleep(0.001)
        return stall

    def close(self) -> None:
        """Let go of the vault."""
        self._snapshotter.close()


class Restore:
    """Fills this rank's tensors from a snapshot of another layout, as a recovery does: chunks hashed, state digested."""

    def __init__(self, job: dict[str, Any], rank: int, atlas: Atlas, held: dict[Piece, Tensor]) -> None:
        self._whole, self._lost = Snapshot.from_json(job["snapshot"]), Snapshot.from_json(job["snapshot_lost"])
        self._node, self._secret = job["nodes"][rank], bytes.fromhex(job["secret"])
        self._atlas, self._rank, self._held = atlas, rank, held

    def load(self) -> None:
        """Every node's vault lives."""
        self._read(self._whole)

    def load_lost(self) -> None:
        """One node is gone: its bytes are decoded."""
        self._read(self._lost)

    def _read(self, snapshot: Snapshot) -> None:
        reader = Reader(snapshot, node=self._node, secret=self._secret)
        try:
            reader.restore(self._atlas, self._rank, self._held)
            share(self._atlas, self._rank, self._held)
        finally:
            reader.close()
