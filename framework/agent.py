"""Agent: what stands for a node between plans. It hosts the node's vault and does what only a local process can.

    controller --open, inventory, status--> agent [ vault ] <--Unix socket-- workers of the node
                                                      ^--TCP-- vaults and readers of other nodes

Rule of this file: a thin host. The vault keeps the bytes (`fault_tolerance/snapshots/vault.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import psutil

from fault_tolerance.checkpoints.index import entry_to_plain
from fault_tolerance.checkpoints.shard import write_shard
from fault_tolerance.detection.probe import Probe
from fault_tolerance.detection.rings import Rings
from fault_tolerance.detection.stacks import stack_of
from fault_tolerance.snapshots.room import room
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault import Vault
from fault_tolerance.snapshots.version import Key, Version
from framework.cluster.network import chosen, interfaces, used_address
from framework.cluster.notice import Notice
from parallel.recorder_build import RECORDER, why_not

BUILD_S = 300.0  # what takes longer to compile is not waited for


class Agent:
    """Hosted in an actor, one a node; its methods are called by name."""

    def __init__(self, *, run_id: str, secret: str, node: str, host: str) -> None:
        """`host` is the address under which other nodes reach this one."""
        self._node = node
        self._vault = Vault(node=node, run=run_id, secret=bytes.fromhex(secret), listen=f"{host}:0")
        self._vault.start()
        Notice().then(lambda: self._vault.events.add("leaving"))
        self._rings = Rings()
        self._holding, self._held = ExitStack(), dict[Key, Version]()
        self._saving, self._taken = threading.Lock(), 0
        self._host = host
        self._probe: Probe | None = None
        self._began = time.monotonic()
        RECORDER.build_beside()

    def address(self) -> str:
        """Where the vault listens."""
        return self._vault.address

    def fence(self, generation: int) -> None:
        """Refuse workers of generations before this one."""
        self._vault.raise_fence(generation)

    def open(self, plan: dict[str, Any]) -> None:
        """Take up the snapshot plan of a generation."""
        self._vault.open(SnapshotPlan.from_json(plan))

    def inventory(self) -> dict[str, Any]:
        """What the vault holds, for the catalogue."""
        return self._vault.inventory()

    def status(self) -> dict[str, Any]:
        """How far the newest snapshots have come."""
        return self._vault.status()

    def hold(self, generation: int) -> list[int]:
        """Keep every whole snapshot of a generation as it is, whatever comes after it, until `let_go`. Returns their steps."""
        self.let_go()
        for key in self._vault.whole(generation):
            with contextlib.suppress(ValueError):  # it went meanwhile
                self._held[key] = self._holding.enter_context(self._vault.reading(key))
        return sorted(step for _, step in self._held)

    def let_go(self) -> None:
        """What was held may go."""
        self._held.clear()
        self._holding.close()

    def save(self, directory: str, generation: int, step: int) -> dict[str, Any]:
        """Write this node's share of a snapshot as a shard of a durable checkpoint. Returns its entry in the index.

        Raises ValueError if the snapshot is not here, or damaged, or a save is still stuck in the storage, and StorageError.
        """
        if not self._saving.acquire(blocking=False):  # each would keep a thread of the few that answer for this node
            raise ValueError("save: the storage must be done with the save before this one, it has not answered yet")
        try:
            return self._save(directory, generation, step)
        finally:
            self._saving.release()

    def taken(self) -> int:
        """Bytes that storage has taken of this node's shares, since the start: whether a save gets on."""
        return self._taken

    def _save(self, directory: str, generation: int, step: int) -> dict[str, Any]:
        with self._reading((generation, step)) as version:
            plan, view = version.plan, version.data.view if version.data is not None else None
            damaged = [b for b in version.blocks() if b[0] == "data" and not version.intact(*b)]
            if damaged:
                raise ValueError(f"save: the snapshot of step {step} must be intact, got damage in block {damaged[0][1]}")
            pieces = [
                (entry.piece, view[plan.base_of(rank) + entry.offset :][: entry.nbytes])
                for rank in plan.ranks_on(self._node)
                for entry in plan.slab(rank).entries
                if view is not None
            ]
            return entry_to_plain(write_shard(directory, self._node, pieces, specs=plan.atlas.specs, taken=self._take))

    def _take(self, num_bytes: int) -> None:
        self._taken += num_bytes

    def _reading(self, key: Key) -> AbstractContextManager[Version]:
        return nullcontext(self._held[key]) if key in self._held else self._vault.reading(key)

    def facts(self) -> dict[str, Any]:
        """The node's memory in bytes (what is free, by pool; what the vault has of it) and load."""
        memory = psutil.virtual_memory()
        own = psutil.Process().memory_info()
        return {
            "room": room(),
            "held_bytes": self._vault.status()["memory_bytes"],
            "total_bytes": memory.total,
            "load": os.getloadavg()[0],
            "rss_bytes": own.rss,
        }

    def vitals(self) -> dict[str, float]:
        """The node's memory and traffic, in bytes (traffic since it booted), its load and processor use since the last time."""
        memory, wire = psutil.virtual_memory(), psutil.net_io_counters()
        return {
            "free_bytes": memory.available,
            "total_bytes": memory.total,
            "cpu_percent": psutil.cpu_percent(),
            "load": os.getloadavg()[0],
            "sent_bytes": wire.bytes_sent,
            "received_bytes": wire.bytes_recv,
            "vault_bytes": self._vault.status()["memory_bytes"],
        }

    def probe(self, what: str, *args: Any, **options: Any) -> Any:
        """Ask this node's probe (`fault_tolerance/detection/probe.py`); the first question opens it."""
        if self._probe is None:
            self._probe = Probe(host=used_address(self._host, os.environ, interfaces()))
        return getattr(self._probe, what)(*args, **options)

    def interface(self) -> str:
        """Through which interface this node's collectives go, and why."""
        return chosen(self._host, os.environ, interfaces())

    def lend_rings(self, generation: int, ranks: list[int]) -> dict[int, str]:
        """Memory for the records of these ranks, as paths."""
        return self._rings.lend(generation, ranks)

    def recorder_comes(self) -> bool:
        """Whether ranks here cannot record yet, and soon can: the recorder is being built. One that takes too long comes never."""
        return not RECORDER.path().exists() and why_not() is None and time.monotonic() - self._began < BUILD_S

    def read_rings(self, generation: int) -> dict[int, bytes]:
        """What is new in the records of this node's ranks."""
        return self._rings.read(generation)

    def stack(self, pid: int, armed: str | None) -> str:
        """What a process of this node is doing, in Python, or why that cannot be told."""
        return stack_of(pid, armed=armed)

    def kill_pid(self, pid: int) -> None:
        """SIGKILL a process of this node; a stopped one dies too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Free everything."""
        if self._probe is not None:
            self._probe.close()
        self._rings.close()
        self._vault.close()
