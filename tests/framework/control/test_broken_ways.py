"""Dead ways are remembered, asked again, and forgotten when they have worked for a while."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import permutations
from typing import Any

from fault_tolerance.detection.reachability import Dead, Way
from framework.control.broken_ways import BrokenWays, Found, Pair, Register
from tests.fault_tolerance.detection import lossy

NODES = ("n0", "n1", "n2")
ALL = frozenset(permutations(NODES, 2))
CELL = ("n1", "n2")
DEAD = Found((Dead(*CELL, "nothing comes"),), ALL)
WELL = Found((), ALL)


def test_a_way_is_believed_again_after_ten_seconds_and_after_twice_as_long_the_next_time() -> None:
    """One that comes and goes must not end a generation each time that it comes."""
    register = Register()
    assert register.take(DEAD, 0.0) == () and list(register.ways) == [CELL]
    assert register.take(WELL, 5.0) == () and register.take(WELL, 14.0) == ()
    assert register.take(DEAD, 14.5) == () and register.take(WELL, 15.0) == (), "it died meanwhile: the time begins anew"
    [told] = register.take(WELL, 25.0)
    assert told == "the way n1>n2 works again, for 10 s by now: it may be used" and not register.ways
    register.take(DEAD, 30.0)
    assert register.take(WELL, 40.0) == () and register.take(WELL, 50.0) == () and register.take(WELL, 60.0) != ()


def test_who_could_not_be_asked_says_nothing_about_a_way() -> None:
    register = Register()
    register.take(DEAD, 0.0)
    for now in (10.0, 60.0):
        assert register.take(Found((), frozenset({("n0", "n1"), ("n1", "n0")})), now) == ()
    assert list(register.ways) == [CELL]


class Network:
    """What machines would see of each other, with one way that may be dead."""

    def __init__(self) -> None:
        self.dead, self.asked = True, list[frozenset[str]]()

    def __call__(self, agents: Mapping[str, Any]) -> Mapping[Pair, Way]:
        self.asked.append(frozenset(agents))
        return lossy.seen(agents, {CELL} if self.dead else ())


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_ends_of_a_dead_way_are_asked_again_until_it_works() -> None:
    network = Network()
    ways = BrokenWays({name: object() for name in NODES}, probe=network, again_s=0.02)  # type: ignore[dict-item]
    try:
        found = ways.examine(NODES)
        assert [d.ends for d in found.dead] == [CELL] == [d.ends for d in ways.dead]
        _until(lambda: len(network.asked) > 2)
        assert network.asked[0] == set(NODES) and set(network.asked[1:]) == {frozenset(CELL)}
        ways._register.deaths[CELL] = -20  # it need not work for long
        network.dead = False
        _until(lambda: not ways.dead)
        assert len(ways.news()) == 1 and ways.news() == ()
    finally:
        ways.close()


def test_a_round_in_the_background_gives_its_finding_once() -> None:
    ways = BrokenWays({name: object() for name in NODES}, probe=Network(), again_s=60.0)  # type: ignore[dict-item]
    try:
        assert ways.found() is None
        ways.begin(NODES)
        found: list[Found] = []
        _until(lambda: found.extend(f for f in [ways.found()] if f is not None) or found)
        assert [d.ends for d in found[0].dead] == [CELL] and ways.found() is None
    finally:
        ways.close()


def test_one_machine_alone_asks_nobody() -> None:
    network = Network()
    ways = BrokenWays({"n0": object()}, probe=network)  # type: ignore[dict-item]
    assert ways.examine(NODES) == Found() and network.asked == []
