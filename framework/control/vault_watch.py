"""VaultWatch: one thread a vault that hears what happens in it, so that the controller never waits for a vault.

    vault --watch(since n), answered when something happens--> thread --queue--> controller's loop, when it looks

    lost     the connection was refused or closed twice in a row (the process is gone), or nothing was heard for
             `silent_s`, which must be longer than a loaded machine lets a healthy process wait

Rule of this file: it hears. What the words mean is `snapshot_log.py`'s.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from fault_tolerance.snapshots.vault_client import VaultClient
from fault_tolerance.snapshots.wire import Refused, WireError

WAIT_S = 1.0
PAUSE_S = 0.2
GONE_AFTER = 3


class VaultWatch:
    """Starts to listen when it is made. Thread-safe."""

    def __init__(self, address: str, *, run: str, secret: bytes, silent_s: float) -> None:
        self._client = VaultClient(address, run=run, secret=secret, timeout_s=silent_s)
        self._silent_s = silent_s
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._seen = 0
        self._ended = threading.Event()
        self.lost = ""
        threading.Thread(target=self._listen, daemon=True, name="vault-watch").start()

    def events(self) -> list[dict[str, Any]]:
        """What has happened since the last time."""
        with self._lock:
            events, self._events = self._events, []
            return events

    def catch_up(self, client: VaultClient) -> None:
        """Hear all that has happened until now, through a client of the caller's. Raises WireError, Refused."""
        self._hear(client.watch(self._seen))

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        threading.Thread(target=self._client.close, daemon=True, name="vault-watch-end").start()

    def _listen(self) -> None:
        failures = 0
        while not self._ended.is_set() and not self.lost:
            began = time.monotonic()
            try:
                self._hear(self._client.watch(self._seen, wait_s=WAIT_S))
                failures = 0
            except (WireError, Refused) as error:
                failures += 1
                silent = time.monotonic() - began > self._silent_s / 2
                if failures >= GONE_AFTER or silent:
                    self.lost = str(error)
                self._ended.wait(PAUSE_S)
        with contextlib.suppress(WireError, Refused):
            self._client.close()

    def _hear(self, events: list[dict[str, Any]]) -> None:
        with self._lock:
            fresh = [event for event in events if event["number"] > self._seen]
            self._events += fresh
            self._seen = max([self._seen, *(int(event["number"]) for event in fresh)])
