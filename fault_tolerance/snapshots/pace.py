"""Pace: a limit on bytes per second, shared by all threads that send.

    budget fills at `rate` up to a tenth of a second's worth; who takes more than is there sleeps off the debt

Rule of this file: it counts and sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.1


class Pace:
    """A token bucket. `rate_bytes_s` None means no limit. Thread-safe."""

    def __init__(
        self,
        rate_bytes_s: float | None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate_bytes_s is not None and rate_bytes_s <= 0:
            raise ValueError(f"pace: rate must be > 0 bytes per second or None, got {rate_bytes_s}")
        self.rate_bytes_s = rate_bytes_s
        self._now, self._sleep = now, sleep
        self._lock = threading.Lock()
        self._free_at = now()

    def __call__(self, nbytes: int) -> None:
        """Account for `nbytes`, and sleep as long as the rate asks."""
        if self.rate_bytes_s is None:
            return
        with self._lock:
            now = self._now()
            self._free_at = max(self._free_at, now - BURST_S) + nbytes / self.rate_bytes_s
            wait = self._free_at - now
        if wait > 0:
            self._sleep(wait)
