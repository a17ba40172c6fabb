"""Quarantine: which machines get no work for now, why, and until when.

    evicted once: `base_s`     again after it came back: twice as long, and so on     expired: may be used again
    lost `most` times in `window_s`: evicted, for a machine that comes and goes costs a recovery each time

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

    def told(self, now_s: float) -> str:
        """In words."""
        still = "until a person lifts it" if self.until_s is None else f"for {self.until_s - now_s:.0f} s"
        return f"{self.reason}; not used {still}"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """All machines that ever were evicted in this run, newest entry of each; and (machine, second) of every loss."""

    entries: tuple[Entry, ...] = ()
    losses: tuple[tuple[str, float], ...] = ()

    def add(self, node: str, reason: str, *, now_s: float, base_s: float, longest_s: float = 86_400.0) -> Quarantine:
        """Evict a machine. `base_s` 0 means until a person lifts it. Raises ValueError if it is negative."""
        if base_s < 0:
            raise ValueError(f"quarantine: base_s must not be negative, got {base_s}")
        before = next((e for e in self.entries if e.node == node), None)
        times = before.times + 1 if before else 1
        until = now_s + min(longest_s, base_s * 2 ** (times - 1)) if base_s else None
        rest = tuple(e for e in self.entries if e.node != node)
        return replace(self, entries=(*rest, Entry(node, reason, now_s, until, times)))

    def lost(self, node: str, *, now_s: float, base_s: float, most: int = 3, window_s: float = 600.0) -> Quarantine:
        """Note that a machine was lost; evict it if that was too often."""
        losses = (*(loss for loss in self.losses if now_s - loss[1] < window_s), (node, now_s))
        noted = replace(self, losses=losses)
        count = sum(name == node for name, _ in losses)
        if count < most:
            return noted
        return noted.add(node, f"{node} was lost {count} times in {window_s:.0f} s", now_s=now_s, base_s=base_s)

    def lift(self, node: str, *, now_s: float) -> Quarantine:
        """Let a machine back before its time; it keeps its count."""
        return replace(self, entries=tuple(replace(e, until_s=now_s) if e.node == node else e for e in self.entries))

    def holds(self, node: str, now_s: float) -> bool:
        """Whether a machine gets no work."""
        return any(e.node == node and e.holds(now_s) for e in self.entries)

    def active(self, now_s: float) -> tuple[Entry, ...]:
        """The entries that hold, oldest first."""
        return tuple(e for e in self.entries if e.holds(now_s))

    def reasons(self, now_s: float) -> dict[str, str]:
        """Why each machine that gets no work does not, and for how long still."""
        return {e.node: e.told(now_s) for e in self.active(now_s)}
