"""Sockets: find and cut the TCP connections of gloo, so that every operation waiting on them raises.

    mine             peer's                     gloo connects every pair of ranks once, from one side or
    listener L  <--- any port                   the other; so a connection is gloo's if its local end is
    any port   --->  listener P                 one of our listeners, or its far end one of a peer's

gloo cannot be aborted: nothing in torch frees a thread that waits in it. A `shutdown` of the sockets does, in about
10 ms, also towards a peer that is stopped. Asking at the moment of cutting, rather than remembering descriptors, also
catches connections that were opened late, and never those of anybody else (the store's, Ray's).

The same search finds them for the kernel to pace what they send, which is how a slow link is made.

Rule of this file: Linux (`/proc/self/fd`). It knows addresses, not ranks or groups.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Address = tuple[str, int]
SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; the socket module has no name for it


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A second handle of a descriptor that stays open for its owner."""
    handle = socket.socket(fileno=os.dup(descriptor))
    try:
        yield handle
    finally:
        handle.close()


def _descriptors() -> Iterator[int]:
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                yield int(entry.name)


def _address(name: tuple[object, ...]) -> Address:
    return str(name[0]).removeprefix("::ffff:"), int(str(name[1]))


def listeners() -> frozenset[Address]:
    """The addresses at which this process accepts TCP connections."""
    found = set()
    for descriptor in _descriptors():
        with suppress(OSError), _borrowed(descriptor) as handle:
            inet = handle.family in (socket.AF_INET, socket.AF_INET6)
            if inet and handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(_address(handle.getsockname()))
    return frozenset(found)


def pace(*, mine: Iterable[Address], theirs: Iterable[Address], bytes_per_s: int) -> int:
    """Hold what goes out over each such connection to a rate (SO_MAX_PACING_RATE). Returns how many are held to it."""
    return _each(mine, theirs, lambda handle: handle.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_s))


def shut_down(*, mine: Iterable[Address], theirs: Iterable[Address]) -> int:
    """Cut every connection that ends at one of my listeners or one of theirs. Returns how many were cut.

    Safe from any thread; a connection that is already gone is passed over.
    """
    return _each(mine, theirs, lambda handle: handle.shutdown(socket.SHUT_RDWR))


def _each(mine: Iterable[Address], theirs: Iterable[Address], do: Callable[[socket.socket], object]) -> int:
    near, far, count = frozenset(mine), frozenset(theirs), 0
    for descriptor in list(_descriptors()):
        with suppress(OSError), _borrowed(descriptor) as handle:
            if handle.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if _address(handle.getpeername()) in far or _address(handle.getsockname()) in near:
                do(handle)
                count += 1
    return count
