"""VaultClient: what a controller asks of a vault.

    client = VaultClient(address, run=run, secret=secret)
    client.open(plan)              make its memory, fence older generations
    client.status()                newest protected step, bytes, wire, who is attached
    client.watch(0, wait_s=1.0)    what happened since event 0: gone, snapshot, bad_chunk, open
    client.inventory()             for `catalogue`

Rule of this file: one request, one answer; every method raises WireError if the vault does not answer in time, and
Refused if it says no.
"""

from __future__ import annotations

import threading
from typing import Any

from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.wire import Channel, Header, WireError, connect

OPEN_S = 600.0  # making a large node's memory takes minutes


class VaultClient:
    """A connection that is made at the first call, and again after trouble.

    Thread-safe, one call at a time: whoever waits in `watch` wants a client of its own.
    """

    def __init__(self, address: str, *, run: str, secret: bytes, timeout_s: float = 10.0) -> None:
        self.address, self._run, self._secret, self._timeout_s = address, run, secret, timeout_s
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    def open(self, plan: SnapshotPlan, *, timeout_s: float = OPEN_S) -> dict[str, Any]:
        """Open a generation. Returns the vault's status."""
        return self._call({"op": "open", "plan": plan.to_json()}, wait_s=timeout_s)

    def fence(self, generation: int) -> None:
        """Refuse what is older than `generation` from now on."""
        self._call({"op": "fence", "generation": generation})

    def status(self) -> dict[str, Any]:
        """See `Vault.status`."""
        return self._call({"op": "status"})

    def watch(self, since: int, *, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Events after number `since`, waiting for the first one."""
        answer = self._call({"op": "watch", "since": since, "wait_s": wait_s}, wait_s=wait_s + self._timeout_s)
        return list(answer["events"])

    def inventory(self) -> dict[str, Any]:
        """See `Vault.inventory`."""
        return self._call({"op": "inventory"})

    def forget(self, generation: int, step: int) -> None:
        """Drop a version that must not be restored again."""
        self._call({"op": "forget", "generation": generation, "step": step})

    def corrupt(
        self, generation: int, step: int, kind: str, index: int, *, offset: int = 0, data: bytes = b""
    ) -> None:
        """Damage a held block, for drills: flip a bit, or overwrite it with `data`."""
        header = {"op": "corrupt", "generation": generation, "step": step, "kind": kind, "index": index}
        self._call(header | {"offset": offset}, data)

    def kill_pid(self, pid: int) -> bool:
        """SIGKILL a worker that was attached to this vault. Whether it was alive."""
        return bool(self._call({"op": "kill", "pid": pid})["alive"])

    def shutdown(self) -> None:
        """End the vault; all it holds is gone."""
        self._call({"op": "shutdown"})

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._drop()

    def _call(self, header: Header, payload: bytes = b"", *, wait_s: float | None = None) -> Header:
        with self._lock:
            if self._channel is None:
                self._channel = connect(
                    self.address, run=self._run, secret=self._secret, timeout_s=self._timeout_s
                )
            try:
                answer, _ = self._channel.call(header, [memoryview(payload)] if payload else (), wait_s=wait_s)
            except WireError:
                self._drop()
                raise
        return answer

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
