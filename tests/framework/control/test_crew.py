"""Crew: who is asked how often, with calls that answer at once."""

import time
from collections import deque

import pytest

from framework.control import crew as module
from framework.control.crew import RARELY, Crew, RankView
from framework.plan import Seat


class Answered:
    """A call that has come back."""

    def __init__(self, value):
        self.value = value

    def result(self, timeout_s):
        return self.value


class Rank:
    """A process that answers, and counts how often it was asked."""

    def __init__(self):
        self.asked = 0

    def call(self, method, acked):
        self.asked += 1
        return Answered({"generation": 1, "progress": (3, "forward"), "said": [(1, {"event": "restored"})], "leaving": False})


class PlanOf:
    generation = 1
    seats = tuple(Seat(f"n{i}", 0) for i in range(3))


@pytest.fixture
def crew(monkeypatch):
    monkeypatch.setattr(module, "wait_all", lambda calls, timeout_s: ([c for c in calls if isinstance(c, Answered)], []))
    ranks = [RankView(Rank(), run=object(), heard=time.monotonic()) for _ in range(3)]
    return Crew(PlanOf(), {}, ranks, deque(maxlen=8), ping_period_s=0.05)


def asked(crew, still_s, periods):
    before = [view.remote.asked for view in crew.ranks]
    until = time.monotonic() + periods * crew.ping_period_s
    while time.monotonic() < until:
        crew.look(still_s)
        time.sleep(0.005)
    return [view.remote.asked - was for view, was in zip(crew.ranks, before, strict=True)]


def test_whose_record_goes_on_is_asked_rarely_and_the_one_who_tells_the_steps_as_often_as_ever(crew):
    """Four ranks that were asked twice a second cost the controller more than all else that its loop does."""
    crew.look({})
    crew.look({})
    teller, working, still = asked(crew, {0: 0.0, 1: 0.1, 2: 5.0}, 4 * RARELY)
    assert working <= 5 < min(teller, still)


def test_who_stands_still_is_asked_at_once_again(crew):
    crew.look({})
    asked(crew, {1: 0.0}, 3)
    before = crew.ranks[1].remote.asked
    time.sleep(1.5 * crew.ping_period_s)
    crew.look({1: 2.0})
    crew.look({1: 2.0})
    assert crew.ranks[1].remote.asked > before


def test_who_has_not_told_of_its_start_is_asked_as_often_as_ever_though_its_record_goes_on(crew):
    crew.ranks[1].remote.call = lambda method, acked: Answered({"generation": 0, "progress": (0, "idle"), "said": [], "leaving": False})
    calls = []
    answer = crew.ranks[1].remote.call
    crew.ranks[1].remote.call = lambda method, acked: calls.append(acked) or answer(method, acked)
    asked(crew, {1: 0.0}, 2 * RARELY)
    assert len(calls) > 4


def test_nobody_waits_for_the_last_words_of_a_machine_that_is_gone(crew):
    """Each loss of a machine that was cut off cost two seconds more, of waiting for who could not answer."""
    said = crew.last_words(gone={"n1"})
    assert [view.remote.asked for view in crew.ranks] == [1, 0, 1] and len(said) == 2
