"""Ring: the file of a rank's record, made by whoever outlives the rank, and read by them.

    vault:   fd = create(rank)      the worker:  install(fd or path)      vault:  RingReader(fd, pid).read() -> bytes

The file is a memfd or lies in /dev/shm, so it costs no disk and is whole when its writer was killed, stopped or holds its
interpreter lock. Reading takes no lock: slots that changed meanwhile are dropped from the copy.

Rule of this file: it moves bytes and asks Linux about one process; what the bytes mean is `record.py`'s.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np

from parallel.record import HEADER, HEADER_BYTES, MAGIC, SEEN, SEEN_AT, SLOT

TABLE_BYTES = 64 << 10
NUM_SLOTS = 8192  # about 10 to 50 steps of a 3-D layout
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def ring_bytes(num_slots: int = NUM_SLOTS) -> int:
    """Size of a ring's file. Raises ValueError unless `num_slots` is a power of two."""
    if num_slots < 64 or num_slots & (num_slots - 1):
        raise ValueError(f"ring: num_slots must be a power of two of at least 64, got {num_slots}")
    return HEADER_BYTES + TABLE_BYTES + num_slots * SLOT.itemsize


def create(name: str, *, directory: str | os.PathLike[str] | None = None, num_slots: int = NUM_SLOTS) -> int:
    """File descriptor of a new, empty ring: a memfd, or a file called `name` if a directory is given."""
    if directory is None:
        fd = os.memfd_create(name)
    else:
        fd = os.open(Path(directory) / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.posix_fallocate(fd, 0, ring_bytes(num_slots))
    return fd


class RingReader:
    """Reads a ring from outside, again and again, each time only what is new.

    `ring` is a path or a descriptor, which stays the caller's. `pid` overrides the process id noted by the rank, for a
    reader in another pid namespace.
    """

    def __init__(self, ring: int | str | os.PathLike[str], *, pid: int | None = None) -> None:
        fd = ring if isinstance(ring, int) else os.open(ring, os.O_RDONLY)
        try:
            self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            if not isinstance(ring, int):
                os.close(fd)
        self._pid = pid
        self._since = 0
        self._owner: tuple[int, int] | None = None

    def read(self, *, whole: bool = False) -> bytes:
        """Header, groups, and the slots that are new or were open at the last reading (all of them if `whole`).

        Empty if nobody installed a recorder on it yet. Costs as much as there is to read, about 0.1 ms for 8192 slots.
        """
        header = bytearray(self._map[:HEADER_BYTES])
        magic, num_slots, table_bytes, *rest = HEADER.unpack_from(header)
        if magic != MAGIC:
            return b""
        pid, start_ticks, head, used = rest[1], rest[2], rest[5], rest[9]
        if self._owner != (pid, start_ticks):
            self._owner, self._since = (pid, start_ticks), 0
        since = 0 if whole else self._since
        slots = np.concatenate([self._slots(HEADER_BYTES + table_bytes, *part) for part in _parts(since, head, num_slots)])
        slots = slots[slots["stamp"] > since]
        self._since = _oldest_open(slots, self._since)
        HEADER.pack_into(header, 0, magic, len(slots), used, *rest)
        SEEN.pack_into(header, SEEN_AT, time.monotonic_ns(), *process_state(self._pid or pid, start_ticks))
        return bytes(header) + self._map[HEADER_BYTES : HEADER_BYTES + used] + slots.tobytes()

    def close(self) -> None:
        """Unmap. The ring itself stays."""
        self._map.close()

    def _slots(self, offset: int, first: int, count: int) -> np.ndarray:
        live = np.frombuffer(self._map, SLOT, count, offset + first * SLOT.itemsize)
        copy = live.copy()
        return copy[copy["stamp"] == live["stamp"]]


def _parts(since: int, head: int, num_slots: int) -> list[tuple[int, int]]:
    """(first slot, how many) of the tickets from `since` on: one stretch, or two where the ring goes round, or all of it."""
    count, first = head - since, since % num_slots
    if not 0 <= count < num_slots:
        return [(0, num_slots)]
    until_end = min(count, num_slots - first)
    return [(first, until_end), (0, count - until_end)]


def _oldest_open(slots: np.ndarray, since: int) -> int:
    """The stamp up to which nothing will change any more."""
    if not len(slots):
        return since
    open_stamps = slots["stamp"][slots["state"] == 0]
    return int(open_stamps.min()) - 1 if len(open_stamps) else int(slots["stamp"].max())


def process_state(pid: int, start_ticks: int) -> tuple[int, bytes]:
    """(processor time in ns, state letter) of a process; `X` if it is gone or another one has its number now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, b"X"
    fields = stat.rpartition(")")[2].split()
    if start_ticks and int(fields[19]) != start_ticks:
        return 0, b"X"
    return (int(fields[11]) + int(fields[12])) * 1_000_000_000 // _TICKS_PER_S, fields[0].encode()


def own_start_ticks() -> int:
    """When this process started, in ticks since boot: with the pid, its identity."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
