"""How often the sentinel looks: rarely while all is well, often when it is not, never for more than its share."""

from __future__ import annotations

from framework.sentinel import CALM_S, LOOK_S, SHARE, pause_s


def test_every_other_step_while_all_is_well():
    assert pause_s(0.4, 0.005, calm=True) == 0.8
    assert pause_s(0.01, 0.005, calm=True) == LOOK_S
    assert pause_s(30.0, 0.005, calm=True) == CALM_S, "a node that stops is seen within seconds, however long a step is"


def test_twice_a_second_when_somebody_stands_still():
    assert pause_s(30.0, 0.005, calm=False) == LOOK_S


def test_judging_that_takes_long_is_done_more_rarely():
    assert pause_s(0.4, 0.1, calm=False) == 0.1 / SHARE
