"""Attachments: the workers of this node that have the vault's memory mapped, and their processes.

    connection open     the worker may write into the segments that it was given
    detached            its snapshotter has unmapped them
    gone                the connection ended without that: the process died, which the kernel tells within a millisecond

Rule of this file: who is there. What they may stage is the vault's matter.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from dataclasses import dataclass
from typing import Any

from fault_tolerance.snapshots.arena import Pool, Segment
from fault_tolerance.snapshots.server import Connection
from fault_tolerance.snapshots.vault_events import VaultEvents
from fault_tolerance.snapshots.wire import Refused


@dataclass(eq=False, slots=True)
class Attachment:
    """A worker's snapshotter, as long as its connection lives."""

    rank: int
    generation: int
    pid: int


class Attachments:
    """Thread-safe."""

    def __init__(self, node: str, pool: Pool, events: VaultEvents) -> None:
        self._node, self._pool, self._events = node, pool, events
        self._lock = threading.RLock()
        self._open: dict[Connection, Attachment] = {}
        self._processes: dict[int, int] = {}
        self._closed = False

    def attach(self, connection: Connection, rank: int, generation: int) -> Attachment:
        """A snapshotter introduces itself. Raises Refused if the seat is taken."""
        with self._lock:
            if any(a.rank == rank and a.generation == generation for a in self._open.values()):
                raise Refused("busy", f"vault {self._node}: rank {rank} is attached already")
            assert connection.pid is not None, "only local connections may attach"
            self._remember(connection.pid)
            self._open[connection] = Attachment(rank, generation, connection.pid)
            return self._open[connection]

    def of(self, connection: Connection) -> Attachment:
        """Who is at the other end. Raises Refused for somebody who is not attached."""
        attachment = self._open.get(connection)
        if attachment is None:
            raise Refused("stranger", f"vault {self._node}: attach first")
        return attachment

    def detach(self, connection: Connection) -> Attachment | None:
        """A snapshotter has let go of its mappings."""
        with self._lock:
            attachment = self._open.pop(connection, None)
            for segment in self._pool.segments():
                segment.borrowers.discard(attachment)
            return attachment

    def gone(self, connection: Connection) -> None:
        """A connection ended; if a worker was still attached to it, that worker died."""
        attachment = self.detach(connection)
        if attachment is not None and not self._closed:
            facts = {"rank": attachment.rank, "generation": attachment.generation}
            self._events.add("gone", pid=attachment.pid, **facts)

    def only_of(self, generation: int, segment: Segment) -> bool:
        """Whether all who have a segment mapped for writing are of this generation."""
        return all(isinstance(b, Attachment) and b.generation == generation for b in list(segment.borrowers))

    def kill_pid(self, pid: int) -> bool:
        """SIGKILL a process that was once attached. Whether it was alive. Raises Refused for any other."""
        with self._lock:
            if pid not in self._processes:
                raise Refused("stranger", f"vault {self._node}: pid {pid} was never attached here")
            try:
                signal.pidfd_send_signal(self._processes[pid], signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True

    def describe(self) -> list[dict[str, Any]]:
        """Who is attached."""
        with self._lock:
            return [{"rank": a.rank, "pid": a.pid, "generation": a.generation} for a in self._open.values()]

    def close(self) -> None:
        """Forget everybody; connections that end from now on say nothing."""
        with self._lock:
            self._closed = True
            for fd in self._processes.values():
                os.close(fd)
            self._processes.clear()

    def _remember(self, pid: int) -> None:
        """By a descriptor, so that a pid that is used again is never mistaken for this process."""
        for known in [p for p, fd in self._processes.items() if _exited(fd)]:
            os.close(self._processes.pop(known))
        if pid not in self._processes:
            self._processes[pid] = os.pidfd_open(pid)


def _exited(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
