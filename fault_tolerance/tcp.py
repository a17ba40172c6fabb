"""TCP: which connections of a process have sent what nobody acknowledged, read from outside.

    /proc/<pid>/fd -> socket inodes      /proc/<pid>/net/tcp -> addresses, unacknowledged bytes, retransmissions

When all ranks came to a collective and it does not end, records cannot tell which of the ways between them is broken. The
kernel can: on a broken way it sends again and again.

Rule of this file: Linux; it reads and decides nothing. The process may be stopped, or hang, or sit in a network namespace.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Connection:
    """An open TCP connection. `unacknowledged` bytes; `retransmissions` of the oldest of them, 0 if all is well."""

    local: Address
    remote: Address
    unacknowledged: int
    retransmissions: int

    @property
    def stuck(self) -> bool:
        """Whether what was sent is not acknowledged though it was sent again."""
        return self.unacknowledged > 0 and self.retransmissions >= 2


def connections(pid: int) -> list[Connection]:
    """The established connections of a process on this machine; none if it is gone."""
    inodes = _inodes(pid)
    out = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "01" and fields[9] in inodes:
                    waiting, again = int(fields[4].split(":")[0], 16), int(fields[6], 16)
                    out.append(Connection(_address(fields[1]), _address(fields[2]), waiting, again))
    return out


def _inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def _address(text: str) -> Address:
    """`0100007F:1F90` as the kernel writes it: words in the machine's order."""
    host, port = text.split(":")
    words = struct.pack(f"={len(host) // 8}I", *(int(host[i : i + 8], 16) for i in range(0, len(host), 8)))
    family = socket.AF_INET if len(words) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, words).removeprefix("::ffff:"), int(port, 16)
