"""Rings: the memory of a node's records, owned by who outlives the ranks: its agent.

    agent:  lend(generation, ranks) -> {rank: path}      worker: recorder.install(path)
            read(generation)        -> {rank: bytes}     while the ranks run, hang, or are dead

A ring is a memfd of this process; the path is how another process of the same machine opens it. Nothing is left when the
agent is gone, and nothing is lost when a rank is.

Rule of this file: it lends and reads memory. What the bytes mean is judged elsewhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

from parallel.ring import RingReader, create


class Rings:
    """The rings of the newest generation on one node. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = -1
        self._readers: dict[int, RingReader] = {}
        self._files: list[int] = []

    def lend(self, generation: int, ranks: Iterable[int]) -> dict[int, str]:
        """New, empty rings for these ranks; those of older generations are given up. Returns the paths to install.

        Raises OSError if there is no memory for them.
        """
        with self._lock:
            self._drop()
            self._generation = generation
            paths = {}
            for rank in ranks:
                fd = create(f"holdfast-ring-{rank}")
                self._files.append(fd)
                self._readers[rank] = RingReader(fd)
                paths[rank] = f"/proc/{os.getpid()}/fd/{fd}"
            return paths

    def read(self, generation: int) -> dict[int, bytes]:
        """What is new in the ring of every rank since the last reading; empty where nothing was ever recorded."""
        with self._lock:
            if generation != self._generation:
                return {}
            return {rank: reader.read() for rank, reader in self._readers.items()}

    def close(self) -> None:
        """Give all of them up. What ranks have mapped stays theirs until they end."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        for reader in self._readers.values():
            reader.close()
        for fd in self._files:
            os.close(fd)
        self._readers, self._files = {}, []
