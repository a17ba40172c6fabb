"""Room: how much more memory this process's machine can give, by the pools that it comes out of.

    machine <boot id>     MemAvailable of /proc/meminfo            every process of the machine draws from it
    cgroup <inode>        limit - usage + reclaimable cache        every process of the container draws from it

Two nodes that name the same pool share it: emulated nodes, or several containers on one machine. Snapshots live in
memfds, which count as memory and not against the size of `/dev/shm`, so a small `/dev/shm` is no limit to them.

Rule of this file: it reads /proc and /sys, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

UNLIMITED = 1 << 60


def room(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Free bytes by pool."""
    pools = {f"machine {_text(proc / 'sys/kernel/random/boot_id')[:8]}": _available(proc)}
    return pools | _groups(proc, cgroups)


def _available(proc: Path) -> int:
    lines = dict(line.split(":", 1) for line in _text(proc / "meminfo").splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) << 10


def _groups(proc: Path, cgroups: Path) -> dict[str, int]:
    """The limits of this process's cgroup and of those above it, where there are any."""
    found: dict[str, int] = {}
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(root):
                break
            free = _free(group, *names)
            if free is not None:
                found[f"cgroup {group.stat().st_ino}"] = free
    return found


def _free(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes that a cgroup may still use, None if it is not limited."""
    most = _text(group / limit).strip()
    if not most.isdigit() or int(most) >= UNLIMITED:
        return None
    stat: Mapping[str, str] = dict(line.split(None, 1) for line in _text(group / "memory.stat").splitlines())
    return max(0, int(most) - int(_text(group / usage) or 0) + int(stat.get(cache, 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
