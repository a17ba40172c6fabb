"""How often the sentinel looks: rarely while all is well, often when it is not, never for more than its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from framework.cluster.cluster import CallError
from framework.trouble.sentinel import CALM_S, LOOK_S, SHARE, SUSPECTS_SHARE, pause_s, record_at_once


def test_every_other_step_while_all_is_well():
    assert pause_s(0.4, 0.005, calm=True) == 0.8
    assert pause_s(0.01, 0.005, calm=True) == LOOK_S
    assert pause_s(30.0, 0.005, calm=True) == CALM_S, "a node that stops is seen within seconds, however long a step is"


def test_twice_a_second_when_somebody_stands_still():
    assert pause_s(30.0, 0.005, calm=False) == LOOK_S


def test_after_each_step_while_somebody_is_suspected_of_being_slow():
    assert pause_s(0.2, 0.001, calm=True, suspects=True) == 0.2
    assert pause_s(30.0, 0.001, calm=True, suspects=True) == CALM_S
    assert pause_s(0.1, 0.020, calm=True, suspects=True) == 0.020 / SUSPECTS_SHARE
    assert pause_s(0.2, 0.022, calm=True, suspects=True) < 0.3 < pause_s(0.2, 0.022, calm=True), (
        "on two cores with a load of 13 a look took 22 ms, and five steps went by before the next"
    )


def test_judging_that_takes_long_is_done_more_rarely():
    assert pause_s(0.4, 0.1, calm=False) == 0.1 / SHARE


class Asked:
    """An agent that answers, or fails to."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer

    def call(self, method: str) -> Any:
        assert method == "recorder_comes"
        return self

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answers", "at_once"),
    [((False, False), True), ((False, True), False), ((False, CallError("gone", actor="agent", node="n1")), True)],
)
def test_all_record_from_the_start_or_wait_for_the_machine_that_still_builds(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[bool | Exception, ...], at_once: bool
) -> None:
    monkeypatch.setattr("framework.cluster.ray_calls.wait_all", lambda calls, timeout_s: None)
    agents: Any = {f"n{i}": Asked(answer) for i, answer in enumerate(answers)}
    plan: Any = SimpleNamespace(nodes=tuple(agents))
    assert record_at_once(plan, agents) is at_once
