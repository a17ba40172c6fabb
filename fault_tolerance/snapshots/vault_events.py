"""VaultEvents: what happened in a vault, numbered, for whoever asks `what is new since number n?`.

Rule of this file: a bounded memory. A reader who comes too late misses events, and never slows the vault.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

MAX_EVENTS = 1024


class VaultEvents:
    """Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._next = 1

    def add(self, kind: str, **facts: Any) -> None:
        """Something happened now."""
        with self._changed:
            self._events.append({"number": self._next, "time": time.time(), "kind": kind, **facts})
            self._next += 1
            self._changed.notify_all()

    def since(self, number: int, *, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Events after `number`; waits up to `wait_s` for the first one."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while self._next - 1 <= number and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [event for event in self._events if event["number"] > number]
