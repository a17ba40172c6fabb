"""Membership: which machines may be used now, which have just joined, and which get no work, why and until when.

    inventory, now and then  --see-->      joined, gone, usable again       news, one sentence each
                                  --settled--> here for `settle_s`          only onto these a crew grows
    lost too often -> barred      twice as long each time                   a machine that comes and goes
    asked to leave -> barred      until it comes back as a new one          a machine that will be taken away; no loss when it is

A machine that is gone in the inventory, or was declared lost by the controller, counts as one loss until it answers again.

Rule of this file: pure values, on the clock of the caller (seconds of a calendar, so that they outlive a process).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fault_tolerance.detection.quarantine import Quarantine
from framework.cluster.nodes import Node

MAX_LOSSES, WINDOW_S = 3, 600.0
ASK_AGAIN_S = 1.0
SETTLE_S = 3.0
LISTED_S = 120.0  # for how long a machine that died may still be listed as alive


@dataclass(frozen=True, slots=True)
class News:
    """Something changed about a machine: `joined`, `gone`, `quarantine` or `expired`. `until` is a time of the calendar."""

    what: str
    node: str
    reason: str
    until: float | None = None


class Membership:
    """The machines of a run over its life. `bar_s` is for how long a first quarantine holds; 0: until the run ends."""

    def __init__(self, *, bar_s: float, settle_s: float = SETTLE_S, max_losses: int = MAX_LOSSES, window_s: float = WINDOW_S) -> None:
        self._bar_s, self._settle_s, self._max, self._window_s = bar_s, settle_s, max_losses, window_s
        self._quarantine = Quarantine()
        self._holding: set[str] = set()
        self._out: set[str] = set()
        self._counted: dict[str, tuple[str, float]] = {}  # node: the life whose end has been counted last, and when
        self._since: dict[str, tuple[str, float]] = {}  # node: the life (Ray's id) that is here, and since when
        self._leaving: dict[str, tuple[str, float]] = {}
        self._announced: set[str] = set()
        self._asked: dict[str, float] = {}
        self._started = False

    def see(self, nodes: Sequence[Node], now: float, *, answers: Callable[[str], bool]) -> list[News]:
        """Take in an inventory. `answers`, which may take a second, is asked now and then of a machine that was lost
        and is listed as alive.
        """
        here = {n.name: n for n in nodes if n.alive and not n.head}
        back = {name for name in self._due(here, now) if answers(name)}
        self._out -= back
        news = [item for name in sorted(set(self._since) - set(here)) for item in self._gone(name, now)]
        for name, node in here.items():
            life, _ = self._since.get(name, ("", now))
            if life == node.ray_id and name not in back:
                continue
            same = self._is_counted(name, life, now)
            if life and life != node.ray_id and name not in back and not same:
                news += self._gone(name, now)  # it was gone and came back between two looks
                self._out.discard(name)
            self._since[name] = (node.ray_id, now)
            if self._started and name not in self._out and not same:
                news.append(News("joined", name, f"{name} has joined" if not life else f"{name} is back"))
        self._leaving = {n: entry for n, entry in self._leaving.items() if n in here and here[n].ray_id == entry[0] and now < entry[1]}
        self._announced = {name for name, node in here.items() if node.draining or name in self._leaving}
        self._started = True
        return news + self._expired(now)

    def usable(self, nodes: Sequence[Node], now: float) -> tuple[Node, ...]:
        """The machines that may get work: alive, not the head, not draining, asked to leave, lost or barred."""
        out = {e.node for e in self._quarantine.active(now)} | set(self._leaving) | self._out
        return tuple(n for n in nodes if n.alive and not n.head and not n.draining and n.name not in out)

    def settled(self, nodes: Sequence[Node], now: float) -> tuple[str, ...]:
        """Usable machines that have been here for a while."""
        names = [n.name for n in self.usable(nodes, now)]
        return tuple(name for name in names if self.age_s(name, now) >= self._settle_s)

    def age_s(self, node: str, now: float) -> float:
        """For how long a machine has been here in its present life; 0 if it is not."""
        return now - self._since.get(node, ("", now))[1]

    def lost(self, node: str, now: float) -> list[News]:
        """The controller has found a machine gone, maybe before the inventory has."""
        return list(self._gone(node, now, told=True))

    def leave(self, node: str, life: str, now: float) -> None:
        """A machine was asked to leave: it gets no work in this life of it (or for a day)."""
        self._leaving[node] = (life, now + 86_400.0)

    @property
    def out(self) -> frozenset[str]:
        """The machines that were lost and have not answered since, whatever the inventory says."""
        return frozenset(self._out)

    @property
    def leaving(self) -> frozenset[str]:
        """The machines that were asked to leave and are still here."""
        return frozenset(self._leaving)

    def evict(self, node: str, reason: str, now: float) -> News:
        """Bar a machine for a while."""
        self._quarantine = self._quarantine.add(node, reason, now_s=now, base_s=self._bar_s)
        return self._barred(node, now)

    def recall(self, events: Sequence[Mapping[str, Any]], now: float) -> None:
        """Learn again, from the events of an earlier life of the controller, who is barred."""
        for event in events:
            if event.get("cause") == "quarantine" and event.get("node"):
                self._quarantine = self._quarantine.add(event["node"], event["reason"], now_s=event["time"], base_s=self._bar_s)
        self._holding = {e.node for e in self._quarantine.active(now)}

    def _due(self, here: Mapping[str, Node], now: float) -> list[str]:
        """The machine that is to be asked now, if any: one at a time, and none in every look."""
        listed = sorted(self._out & here.keys(), key=lambda name: self._asked.get(name, 0.0))
        due = [name for name in listed[:1] if now - self._asked.get(name, 0.0) >= ASK_AGAIN_S]
        self._asked |= dict.fromkeys(due, now)
        return due

    def _is_counted(self, node: str, life: str, now: float) -> bool:
        """Whether the end of this life of a machine was counted before: a machine that is started again at once answers
        while the inventory still lists its former life.
        """
        counted, at = self._counted.get(node, ("", 0.0))
        return bool(life) and life == counted and now - at < LISTED_S

    def _gone(self, node: str, now: float, *, told: bool = False) -> Iterator[News]:
        life, _ = self._since.pop(node, ("", now))
        if node in self._out:
            return
        known = not told and self._is_counted(node, life, now)
        self._counted[node] = (life, now)
        self._out.add(node)
        self._asked[node] = now
        yield News("gone", node, f"{node} is gone")
        if not known and not self._quarantine.holds(node, now) and node not in self._announced:
            self._quarantine = self._quarantine.lost(
                node, now_s=now, base_s=self._bar_s, most=self._max, window_s=self._window_s
            )
            if self._quarantine.holds(node, now):
                yield self._barred(node, now)

    def _barred(self, node: str, now: float) -> News:
        self._holding.add(node)
        entry = next(e for e in self._quarantine.entries if e.node == node)
        return News("quarantine", node, entry.told(now), entry.until_s)

    def _expired(self, now: float) -> list[News]:
        held = {e.node for e in self._quarantine.active(now)}
        free, self._holding = self._holding - held, self._holding & held
        return [News("expired", node, f"the quarantine of {node} is over; it may be used again") for node in sorted(free)]
