"""Ray's head is looked for by a connection a second; who stays away too long is given up with a word, who comes back is not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from framework.cluster.head_watch import Absence, HeadWatch


def test_only_an_absence_without_a_break_is_final() -> None:
    absence = Absence()
    for second, answers in enumerate([True, False, False, True, False, False]):
        absence = absence.look(float(second), answers=answers)
    assert absence.since == 4.0
    assert not absence.is_final(7.0, 3.0) and absence.is_final(7.1, 3.0)
    assert not Absence().is_final(1e9, 3.0)


def listening(port: int = 0) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(64)
    return server


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_head_that_comes_back_is_told_of_and_one_that_stays_away_ends_the_run() -> None:
    """A driver whose head was lost was ended by Ray after a minute, with code 1 and a line of Ray's log."""
    told: list[str] = []
    gone: list[str] = []
    away: list[int] = []
    server = listening()
    port = server.getsockname()[1]
    with HeadWatch(
        f"127.0.0.1:{port}", tell=told.append, away=lambda: away.append(len(told)), gone=gone.append, patience_s=2.0, look_s=0.02
    ):
        server.close()
        wait(lambda: told)
        assert not away, "a moment is nothing"
        wait(lambda: away)
        server = listening(port)
        wait(lambda: len(told) == 2)
        assert "does not answer" in told[0] and "answers again, after" in told[1] and not gone
        away.clear()
        server.close()
        wait(lambda: gone)
    assert len(away) == 3, "it is counted from the newest absence, again and again"
    assert gone == [f"Ray's head at 127.0.0.1:{port} must answer, and has not for 2 s"]
