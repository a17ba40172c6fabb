"""A save gets on as long as its storage takes something, however slowly; not by being asked often, nor by beginning anew."""

from __future__ import annotations

from framework.control.headway import Headway


def test_what_is_taken_slowly_is_waited_for_and_what_is_not_taken_any_more_is_not() -> None:
    headway = Headway(since=0.0)
    for second in range(0, 600, 20):
        headway = headway.look(float(second), second * 1000)
        assert not headway.is_stalled(second + 25.0, 30.0)
    for second in range(600, 640):
        headway = headway.look(float(second), 580_000)
    assert headway.is_stalled(640.0, 30.0) and not headway.is_stalled(640.0, 300.0)


def test_a_count_that_falls_is_no_headway() -> None:
    headway = Headway(since=0.0).look(1.0, 100).look(2.0, 0).look(3.0, 100)
    assert headway == Headway(since=1.0, num_bytes=100)
