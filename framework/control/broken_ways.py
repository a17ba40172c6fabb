"""Broken ways: which ways between machines are known to be dead, and whether they work again by now.

    a hang without a place, a crew that does not get together --examine--> dead ways     told, and remembered
    dead ways, asked again now and then ------------------------------> works again --for a while--> forgotten

A machine is not judged, a way is: whom to do without is worked out anew from the dead ways each time (`leave_out`), so that
an end of one is used again as soon as its other end is gone, or the way is back.

Rule of this file: it asks and remembers, in a thread of its own where somebody could be kept waiting; it decides nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fault_tolerance.detection.reachability import Dead, Way, dead_ways
from framework.cluster.cluster import Remote
from framework.control.way_probe import probe_ways

Pair = tuple[str, str]
ASK_AGAIN_S = 5.0
PROVEN_S, LONGEST_S = 10.0, 3600.0  # for how long a way must have worked; twice as long each time that it dies


@dataclass(frozen=True, slots=True)
class Found:
    """What one round of asking came to: the dead ways among all that were asked."""

    dead: tuple[Dead, ...] = ()
    asked: frozenset[Pair] = frozenset()


@dataclass(slots=True)
class Known:
    """A dead way, and since when it has been seen to work again."""

    dead: Dead
    works_since: float | None = None


@dataclass(slots=True)
class Register:
    """The dead ways and how often each has died. Times on the caller's clock."""

    ways: dict[Pair, Known] = field(default_factory=dict)
    deaths: dict[Pair, int] = field(default_factory=dict)

    def take(self, found: Found, now: float) -> tuple[str, ...]:
        """Take in what was found. Returns a sentence for each way that is well again."""
        gone = {d.ends: d for d in found.dead}
        for ends, d in gone.items():
            if ends not in self.ways:
                self.deaths[ends] = self.deaths.get(ends, 0) + 1
            self.ways[ends] = Known(d)
        back = []
        for ends in sorted(found.asked & self.ways.keys() - gone.keys()):
            known = self.ways[ends]
            if known.works_since is None:
                known.works_since = now
            proven_s = self.proven_s(ends)
            if now - known.works_since >= proven_s:
                del self.ways[ends]
                back.append(f"the {known.dead} works again, for {proven_s:.0f} s by now: it may be used")
        return tuple(back)

    def proven_s(self, ends: Pair) -> float:
        """For how long a way must have worked before it is believed."""
        return min(LONGEST_S, PROVEN_S * 2.0 ** (self.deaths.get(ends, 1) - 1))


class BrokenWays:
    """Of one run, over its life. `agents` are those that live, by machine."""

    def __init__(
        self,
        agents: Mapping[str, Remote],
        *,
        probe: Callable[[Mapping[str, Remote]], Mapping[Pair, Way]] = probe_ways,
        again_s: float = ASK_AGAIN_S,
    ) -> None:
        self._agents, self._probe, self._again_s = agents, probe, again_s
        self._register, self._lock = Register(), threading.Lock()
        self._news: list[str] = []
        self._round: threading.Thread | None = None
        self._found: Found | None = None
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def dead(self) -> tuple[Dead, ...]:
        """The ways that are known to be dead. Does not wait."""
        with self._lock:
            return tuple(known.dead for known in self._register.ways.values())

    def examine(self, nodes: Iterable[str]) -> Found:
        """Have these machines ask each other now. Takes some seconds."""
        asked = {node: agent for node, agent in list(self._agents.items()) if node in set(nodes)}
        seen = self._probe(asked) if len(asked) > 1 else {}
        found = Found(dead_ways(seen), frozenset(seen))
        with self._lock:
            self._news += self._register.take(found, time.monotonic())
            if self._register.ways and self._keeper is None and not self._over.is_set():
                self._keeper = threading.Thread(target=self._ask_again, daemon=True, name="broken ways")
                self._keeper.start()
        return found

    def news(self) -> tuple[str, ...]:
        """Sentences on the ways that work again, each once."""
        with self._lock:
            told, self._news = tuple(self._news), []
        return told

    def begin(self, nodes: Collection[str]) -> None:
        """`examine` in the background, unless it is under way."""
        if self._round is None:
            self._round = threading.Thread(target=self._examine, args=(tuple(nodes),), daemon=True, name="way probe")
            self._round.start()

    def found(self) -> Found | None:
        """What the background round came to, once; None while there is nothing."""
        if self._round is None or self._round.is_alive():
            return None
        self._round, found, self._found = None, self._found, None
        return found

    def close(self) -> None:
        """Ask no more."""
        self._over.set()

    def _examine(self, nodes: tuple[str, ...]) -> None:
        self._found = self.examine(nodes)

    def _ask_again(self) -> None:
        """The ends of dead ways, until none is left."""
        while not self._over.wait(self._again_s):
            self.examine({node for d in self.dead for node in d.ends})
            with self._lock:
                if not self._register.ways:
                    self._keeper = None
                    return
