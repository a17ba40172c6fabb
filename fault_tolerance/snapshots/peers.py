"""Peers: connections to the other vaults of a run, opened when needed and used again.

Rule of this file: a connection that had any trouble is closed, never put back.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fault_tolerance.snapshots.wire import Channel, Header, Refused, Traffic, connect

MAX_IDLE = 4


class Peers:
    """By node. Thread-safe: each borrower has a connection of its own."""

    def __init__(
        self, addresses: Mapping[str, str], *, run: str, secret: bytes, timeout_s: float = 10.0, traffic: Traffic
    ) -> None:
        self._addresses, self._run, self._secret = dict(addresses), run, secret
        self._timeout_s, self._traffic = timeout_s, traffic
        self._lock = threading.Lock()
        self._idle: defaultdict[str, list[Channel]] = defaultdict(list)
        self._busy: set[Channel] = set()
        self._closed = False

    @contextmanager
    def borrow(self, node: str) -> Iterator[Channel]:
        """A connection to a node's vault. Raises WireError if there is none to be had in time."""
        channel = self._take(node)
        try:
            yield channel
        except BaseException as error:
            with self._lock:
                self._busy.discard(channel)
            if not isinstance(error, Refused):
                channel.close()
            else:
                self._put(node, channel)
            raise
        self._put(node, channel)

    def call(self, node: str, header: Mapping[str, Any], *payload: memoryview, wait_s: float | None = None) -> Header:
        """One request, and the header of its answer."""
        with self.borrow(node) as channel:
            answer, _ = channel.call(header, payload, wait_s=wait_s)
        return answer

    def close(self) -> None:
        """End all connections; borrowers that wait are woken up with WireError."""
        with self._lock:
            self._closed = True
            channels = [*self._busy, *(channel for idle in self._idle.values() for channel in idle)]
            self._idle.clear()
        for channel in channels:
            channel.close()

    def _take(self, node: str) -> Channel:
        with self._lock:
            idle = self._idle[node]
            channel = idle.pop() if idle else None
        if channel is None:
            channel = connect(
                self._addresses[node],
                run=self._run,
                secret=self._secret,
                timeout_s=self._timeout_s,
                traffic=self._traffic,
            )
        with self._lock:
            self._busy.add(channel)
        return channel

    def _put(self, node: str, channel: Channel) -> None:
        with self._lock:
            self._busy.discard(channel)
            if not self._closed and len(self._idle[node]) < MAX_IDLE:
                self._idle[node].append(channel)
                return
        channel.close()
