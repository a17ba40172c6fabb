"""Housekeeper: the vault's slow thread. It re-reads what is held, and gives up versions that take too long.

    every tick:   a few chunks, as many as `scrub_bytes_s` allows, are hashed again; one that fails is marked bad,
                  which erases it, and is made again out of the other blocks of its stripe while that can be done
                  (`repair.py`); if it cannot, reads decode around it, and the tolerance is one less
                  a version that is pending for longer than `deadline_s` is abandoned by the coordinator

Rule of this file: it finds and marks; it decides nothing about versions but that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fault_tolerance.snapshots.background import give_way
from fault_tolerance.snapshots.repair import repair
from fault_tolerance.snapshots.version import Version

if TYPE_CHECKING:
    from fault_tolerance.snapshots.vault import Vault

TICK_S = 0.2
IDLE_S = 1.0  # while nothing is held


class Housekeeper:
    """A daemon thread that ends when the vault is closed."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._chunks: Iterator[tuple[Version, str, int, int]] = iter(())

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, daemon=True, name="housekeeper").start()

    def _run(self) -> None:
        give_way()
        while not self._vault.closed.wait(TICK_S if self._vault.versions else IDLE_S):
            self._give_up()
            plan = self._vault.plan
            if plan is not None and plan.scrub_bytes_s > 0:
                self.scrub(plan.scrub_bytes_s * TICK_S)

    def _give_up(self) -> None:
        vault, now = self._vault, time.monotonic()
        with vault.changed:
            late = [v for v in vault.versions.values() if v.pending and now - v.began > v.plan.deadline_s]
        for version in late:
            reason = f"not protected within {version.plan.deadline_s:g} s"
            if version.plan.coordinator == vault.node:
                vault.agreement.announce(version, "abandon", reason)
            elif now - version.began > 2 * version.plan.deadline_s:
                vault.settle(version, "abandon", reason + ", and nobody said so")

    def scrub(self, budget_bytes: float) -> None:
        """Check chunks in turn until the budget is used up; at most one round is begun, however large the budget is."""
        around = False
        while budget_bytes > 0 and not self._vault.closed.is_set():
            item = next(self._chunks, None)
            if item is not None:
                budget_bytes -= self._check(*item)
            elif around:
                return
            else:
                self._chunks, around = self._held(), True

    def _held(self) -> Iterator[tuple[Version, str, int, int]]:
        with self._vault.changed:
            versions = list(self._vault.versions.values())
            blocks = [(v, kind, index) for v in versions for kind, index in v.blocks()]
        for version, kind, index in blocks:
            for chunk in range(version.plan.num_chunks(version.real_bytes(kind, index))):
                yield version, kind, index, chunk

    def _check(self, version: Version, kind: str, index: int, chunk: int) -> int:
        """The bytes that were hashed: none of a chunk that is known to be bad, or gone."""
        vault = self._vault
        with vault.changed:
            segment = version.data if kind == "data" else version.parity
            if version.dropped or segment is None or (kind, index, chunk) in version.bad:
                return 0
            pool = vault.data_pool if kind == "data" else vault.parity_pool
            pinned = pool.pinned(segment)
            pinned.__enter__()
        try:
            if not version.check(kind, index, chunk):
                self._mend(version, kind, index, chunk)
        finally:
            pinned.__exit__(None, None, None)
        return version.plan.chunk_bytes

    def _mend(self, version: Version, kind: str, index: int, chunk: int) -> None:
        mended = repair(version, kind, index, chunk, peers=self._vault.peers) and version.check(kind, index, chunk)
        if mended:
            with self._vault.changed:
                version.bad.discard((kind, index, chunk))
        facts = {"generation": version.plan.generation, "step": version.step, "block": f"{kind} {index}"}
        self._vault.events.add("bad_chunk", **facts, chunk=chunk, repaired=mended)
