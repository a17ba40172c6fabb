"""Which machines answer, and that nobody waits for those that do not."""

import socket
import threading
import time

from framework.cluster.answering import Answering, takes_connections


class Machines:
    """`probe` of machines of which some are silent for 0.3 s before they fail."""

    def __init__(self, *silent: str) -> None:
        self.silent, self.asked = set(silent), []

    def probe(self, name: str) -> bool:
        self.asked.append(name)
        if name in self.silent:
            time.sleep(0.3)
        return name not in self.silent


def asking() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("asks ")}


def test_many_are_asked_at_once(monkeypatch):
    monkeypatch.setattr("framework.cluster.answering.ASK_AGAIN_S", 0.05)
    machines = Machines(*"abcdefgh")
    began = time.monotonic()
    assert Answering(machines.probe).ask("abcdefghij") == frozenset("abcdefgh")
    assert time.monotonic() - began < 1.5
    assert len(asking()) == 8
    machines.silent.clear()
    while asking():
        assert time.monotonic() - began < 10, "who answers is asked no more"
        time.sleep(0.01)


def test_who_is_silent_is_not_waited_for_again_until_it_answers(monkeypatch):
    """A host that was cut off cost every look of the controller a second, for as long as Ray believed in it."""
    monkeypatch.setattr("framework.cluster.answering.ASK_AGAIN_S", 0.05)
    machines = Machines("cut")
    reach = Answering(machines.probe)
    assert reach.ask(["there", "cut"]) == {"cut"} == reach.silent
    began = time.monotonic()
    assert all(reach.ask(["there", "cut"]) == {"cut"} for _ in range(20))
    assert time.monotonic() - began < 0.3
    machines.silent.clear()
    while reach.silent:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    assert reach.ask(["there", "cut"]) == frozenset()
    while asking():
        assert time.monotonic() - began < 10
        time.sleep(0.01)


def test_a_port_that_nobody_listens_at_takes_no_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert takes_connections(*server.getsockname(), 1.0)
        address = server.getsockname()
    assert not takes_connections(*address, 1.0)
