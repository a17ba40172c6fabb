"""Quarantine: which machines get no work for now, why, and until when.

    evicted once: `base_s`     again after it came back: twice as long, and so on     expired: may be used again

Rule of this file: pure values; seconds on any clock that the caller keeps using. It does not know who places work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Entry:
    """`until_s` None: until a person lifts it."""

    node: str
    reason: str
    since_s: float
    until_s: float | None
    times: int = 1

    def holds(self, now_s: float) -> bool:
        """Whether the machine is still out."""
        return self.until_s is None or now_s < self.until_s


@dataclass(frozen=True, slots=True)
class Quarantine:
    """All machines that ever were evicted in this run, newest entry of each."""

    entries: tuple[Entry, ...] = ()

    def add(self, node: str, reason: str, *, now_s: float, base_s: float, longest_s: float = 86_400.0) -> Quarantine:
        """Evict a machine. `base_s` 0 means until a person lifts it. Raises ValueError if it is negative."""
        if base_s < 0:
            raise ValueError(f"quarantine: base_s must not be negative, got {base_s}")
        before = next((e for e in self.entries if e.node == node), None)
        times = before.times + 1 if before else 1
        until = now_s + min(longest_s, base_s * 2 ** (times - 1)) if base_s else None
        rest = tuple(e for e in self.entries if e.node != node)
        return Quarantine((*rest, Entry(node, reason, now_s, until, times)))

    def lift(self, node: str, *, now_s: float) -> Quarantine:
        """Let a machine back before its time; it keeps its count."""
        return Quarantine(tuple(replace(e, until_s=now_s) if e.node == node else e for e in self.entries))

    def holds(self, node: str, now_s: float) -> bool:
        """Whether a machine gets no work."""
        return any(e.node == node and e.holds(now_s) for e in self.entries)

    def active(self, now_s: float) -> tuple[Entry, ...]:
        """The entries that hold, oldest first."""
        return tuple(e for e in self.entries if e.holds(now_s))
