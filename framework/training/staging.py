"""Staging: a worker's snapshots as the trainer uses them, on top of `fault_tolerance.snapshots.snapshot.Snapshotter`.

Rule of this file: it only suits one to the other; and it knows when a run may end: not before its last state is safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fault_tolerance.snapshots.snapshot import GATE_S, Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from parallel.atlas import Piece

FAILED_S = 10.0  # until those whose loss made a snapshot fail are surely missed


class NotProtected(RuntimeError):
    """The last snapshot of a generation could not be made safe; its cause is in the vaults."""


class Staging:
    """`Snapshots` of `framework/trainer.py` for one rank and generation."""

    def __init__(
        self, plan: SnapshotPlan, *, rank: int, secret: bytes, given_up: Callable[[], bool] = lambda: False, patient: bool = False
    ) -> None:
        """Attach to this node's vault. `given_up` says whether the generation has been ended, so that nobody waits any more.
        `patient`: training waits for a vault that is slow to make room, and no snapshot is given up for that.

        Raises WireError or Refused.
        """
        self._snapshotter = Snapshotter(plan, rank=rank, secret=secret, gate_s=plan.deadline_s if patient else GATE_S)
        self._patience_s, self._given_up = plan.deadline_s, given_up
        self._failed_at: float | None = None

    def ready(self) -> bool:
        """Whether there is room for another snapshot."""
        return self._snapshotter.ready()

    def begin(self, step: int, extra: dict[str, Any], tensors: Mapping[Piece, Tensor]) -> None:
        """Start copying the state of a step."""
        self._snapshotter.begin(step, extra, tensors)

    def gate(self) -> float:
        """Wait until the state may be overwritten; the seconds that took."""
        return self._snapshotter.gate()

    def staged(self, step: int) -> dict[Piece, Tensor]:
        """What was copied of this step."""
        return self._snapshotter.staged(step)

    def protected(self) -> int:
        """The newest step of this generation that any tolerated loss leaves decodable; -1: none yet."""
        protected = self._snapshotter.protected
        return -1 if protected is None else protected

    def await_protected(self, step: int) -> float:
        """After the gate: wait until a snapshot of `step` or later is protected, if one is on its way. Returns the seconds."""
        return self._wait(step, self._nothing_comes, self._patience_s)

    def await_end(self, step: int, patience_s: float) -> float:
        """The same where nothing may be on its way any more: what made a snapshot fail may be about to end the generation."""
        return self._wait(step, self._given_up, patience_s)

    def _wait(self, step: int, in_vain: Callable[[], bool], patience_s: float) -> float:
        began = time.monotonic()
        while self.protected() < step and not in_vain() and time.monotonic() - began < patience_s:
            time.sleep(0.002)
        return time.monotonic() - began

    def copy_s(self) -> float:
        """How long the last copy took, in the background."""
        return self._snapshotter.copy_s

    def cost_s(self) -> float:
        """What the last snapshot cost this rank."""
        return self._snapshotter.cost_s()

    def has_room(self) -> bool:
        """As `ready`, for a snapshot that must be taken. Raises NotProtected where waiting is of no use: of a vault that has failed some
        time after it has, for if its process is gone the crew is about to be told.
        """
        if self._snapshotter.failure and self._failed_at is None:
            self._failed_at = time.monotonic()
        failed = self._failed_at is not None and time.monotonic() - self._failed_at > FAILED_S
        if failed or self._snapshotter.fenced:
            raise NotProtected(f"no room for another snapshot: {self._why()}")
        return self._snapshotter.ready()

    def why_not_ready(self) -> str:
        """Why a snapshot that is due is left out, on all ranks alike; this rank's reason, if it is one of those."""
        return self._snapshotter.failure or "the one before is not protected yet: it takes longer than the interval"

    def finish(self, step: int) -> None:
        """Wait until the snapshot of `step` is protected. Raises NotProtected."""
        self._snapshotter.gate()
        self.await_protected(step)
        if self.protected() < step:
            raise NotProtected(f"the snapshot of step {step} is not protected: {self._why()}")

    def close(self) -> None:
        """Let go of the vault's memory."""
        self._snapshotter.close()

    def _nothing_comes(self) -> bool:
        """Whether no snapshot is on its way: there is room for another one, or there will never be."""
        snapshotter = self._snapshotter
        return snapshotter.ready() or bool(snapshotter.failure) or snapshotter.fenced or self._given_up()

    def _why(self) -> str:
        if self._snapshotter.fenced:
            return "a newer generation is open"
        return self._snapshotter.failure or self._snapshotter.missed or "the vaults gave it up, or it takes too long"
