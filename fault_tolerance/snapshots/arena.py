"""Arena: the memory that snapshots live in, owned by the vault and lent to workers.

    vault  --memfd, passed over a Unix socket-->  worker maps it, copies its state in, is SIGKILLed
      |                                              the bytes stay: the vault's descriptor keeps them
      +-- dies: the kernel frees them; nothing has a name, so nothing can be left behind in /dev/shm

All pages are made when a segment is: the first touch of a page costs ten times a copy into it, so it is paid once,
and a machine without enough memory says so at the start. Segments are used again, version after version.

Who may write. A mapping cannot be taken back from a worker. So a segment is handed to the writers of a generation
only while nobody of an older one still has it: `borrowers` are the connections that it was given to, and one that is
closed means a process that died or a snapshotter that let go. A stopped worker of an old generation therefore keeps
its segment for itself until somebody kills it, and can spoil no version that counts.

Rule of this file: memory and descriptors; no protocol and no versions.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.snapshots.slab import align

PAGE = 4096
CONTROL_WORDS = ("generation", "ready", "protected")  # `protected` is a step + 1, 0 for none
_ids = count(1)


class Segment:
    """`nbytes` of shared memory behind a descriptor. `pins` counts the threads that are using it just now."""

    def __init__(self, nbytes: int, *, name: str) -> None:
        """Raises OSError if there is not enough memory."""
        self.id = next(_ids)
        self.nbytes = max(PAGE, align(nbytes, PAGE))
        self.fd = os.memfd_create(f"holdfast-{name}"[:200], os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, self.nbytes)
            self.view = map_shared(self.fd, self.nbytes, write=True)
        except OSError:
            os.close(self.fd)
            raise
        self.borrowers: set[object] = set()
        self.pins = 0

    def reader_fd(self) -> int:
        """A new descriptor of the same memory through which nothing can be written; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go; the memory is freed when the last mapping of it is gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.view = np.empty(0, np.uint8)


class Pool:
    """Segments of one size that are used in turn. Thread-safe."""

    def __init__(self, *, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._used: list[Segment] = []
        self._free: list[Segment] = []

    @property
    def nbytes(self) -> int:
        """All memory of this pool."""
        with self._lock:
            return sum(segment.nbytes for segment in (*self._used, *self._free))

    def segments(self) -> list[Segment]:
        """Those that are in use, then those that are free."""
        with self._lock:
            return [*self._used, *self._free]

    def acquire(self, nbytes: int, *, may_use: Callable[[Segment], bool] = lambda segment: True) -> Segment:
        """A free segment that holds `nbytes` and passes `may_use`, or a new one. Raises OSError if memory is short."""
        size = max(PAGE, align(nbytes, PAGE))
        with self._lock:
            fitting = [s for s in self._free if s.nbytes == size and s.pins == 0 and may_use(s)]
            if fitting:
                chosen = fitting[0]
                self._free.remove(chosen)
            else:
                self._discard()
                chosen = Segment(size, name=self._name)
            self._used.append(chosen)
            return chosen

    def prepare(self, nbytes: int, *, number: int, may_use: Callable[[Segment], bool]) -> None:
        """Have `number` segments in all, making those that are missing now, so that nobody waits for them later."""
        size = max(PAGE, align(nbytes, PAGE))
        with self._lock:
            self._discard(keep=lambda s: s.nbytes == size and may_use(s))
            while len(self._used) + len(self._free) < number:
                self._free.append(Segment(size, name=self._name))

    def release(self, segment: Segment) -> None:
        """Its content is not needed any more."""
        with self._lock:
            if segment in self._used:
                self._used.remove(segment)
                self._free.append(segment)

    @contextmanager
    def pinned(self, segment: Segment) -> Iterator[NDArray[np.uint8]]:
        """Its bytes, which are not given to anybody else meanwhile."""
        with self._lock:
            segment.pins += 1
        try:
            yield segment.view
        finally:
            with self._lock:
                segment.pins -= 1

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            for segment in (*self._used, *self._free):
                segment.close()
            self._used.clear()
            self._free.clear()

    def _discard(self, keep: Callable[[Segment], bool] = lambda segment: False) -> None:
        for segment in [s for s in self._free if s.pins == 0 and not keep(s)]:
            self._free.remove(segment)
            segment.close()


class Control:
    """A page of words that the vault writes and its workers read, so that asking costs them nothing."""

    def __init__(self) -> None:
        self._segment = Segment(PAGE, name="control")
        self._words = self._segment.view.view(np.uint64)

    def set(self, word: str, value: int) -> None:
        """Write one of CONTROL_WORDS."""
        self._words[CONTROL_WORDS.index(word)] = value

    def reader_fd(self) -> int:
        """A descriptor for `map_shared(..., write=False)`; the caller closes it."""
        return self._segment.reader_fd()

    def close(self) -> None:
        """Let go of it; what is set from now on, nobody sees."""
        self._words = np.zeros(len(CONTROL_WORDS), np.uint64)
        self._segment.close()


def map_shared(fd: int, nbytes: int, *, write: bool) -> NDArray[np.uint8]:
    """The memory behind a descriptor, as bytes; unmapped when the last array on it is gone."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    return np.frombuffer(mmap.mmap(fd, nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, access), np.uint8)
