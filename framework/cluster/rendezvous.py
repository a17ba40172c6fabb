"""Rendezvous: the store at which the ranks of a generation meet.

It lives in the controller, never in a worker: a store whose host dies answers `set` as if nothing had happened. Each
generation uses it under a prefix of its own (`parallel/mesh.py`), so that ranks of old ones meet nobody.

Rule of this file: one TCPStore and its address.
"""

from __future__ import annotations

from torch._C._distributed_c10d import TCPStore


class Rendezvous:
    """A store served by this process on every interface."""

    def __init__(self, host: str) -> None:
        """`host` is the address under which workers reach this process."""
        self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
        self.address: tuple[str, int] = (host, self._store.port)
