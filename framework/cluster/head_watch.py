"""Head watch: whether the head of a Ray cluster that was joined is still there, and a last word if it is not.

    a connection to GCS now and then  ok, ok, refused, refused, ...    for longer than PATIENCE_S   ->  gone
                                                    each quarter of it:  away

Ray itself looks for its head for a minute, and then ends every process that had joined it, in the middle of whatever it does,
with an exit code of its own. Until then actors still answer each other, so that the state can be saved; and the driver says
what happened, and how to go on, before it is ended too. A head that comes back in time, as one does that keeps its state in
Redis, is only told of.

Rule of this file: it looks from a thread of its own and calls back; what is done then is `driver.py`'s matter.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE_S = 45.0  # below Ray's own minute (gcs_rpc_server_reconnect_timeout_s)
LOOK_S = 2.0
CONNECT_S = 3.0


@dataclass(frozen=True, slots=True)
class Absence:
    """Since when nobody has answered; None while somebody does."""

    since: float | None = None

    def look(self, now: float, *, answers: bool) -> Absence:
        """After another look."""
        return Absence() if answers else Absence(now if self.since is None else self.since)

    def is_final(self, now: float, patience_s: float) -> bool:
        """Whether it has lasted too long."""
        return self.since is not None and now - self.since > patience_s


class HeadWatch:
    """Calls `tell` when the head is away, and when it is back; `away`, which must not block, again and again while it is away;
    `gone`, once, when it stayed away. Use it as a context.
    """

    def __init__(
        self,
        address: str,
        *,
        tell: Callable[[str], None],
        away: Callable[[], None],
        gone: Callable[[str], None],
        patience_s: float = PATIENCE_S,
        look_s: float = LOOK_S,
    ) -> None:
        self._host, _, port = address.rpartition(":")
        self._address, self._port = address, int(port)
        self._tell, self._away, self._gone = tell, away, gone
        self._patience_s, self._away_s, self._look_s = patience_s, patience_s / 4, look_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="head-watch")

    def __enter__(self) -> HeadWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        absence, times = Absence(), 0
        while not self._over.wait(self._look_s):
            before, now = absence, time.monotonic()
            absence = absence.look(now, answers=self._answers())
            if self._over.is_set():
                return
            if absence.is_final(time.monotonic(), self._patience_s):
                self._gone(f"Ray's head at {self._address} must answer, and has not for {self._patience_s:.0f} s")
                return
            times = 0 if absence.since is None else times
            if absence.is_final(now, (times + 1) * self._away_s):
                times += 1
                self._away()
            if before.since is None and absence.since is not None:
                self._tell(f"Ray's head at {self._address} does not answer; the run ends if it stays away for {self._patience_s:.0f} s")
            elif before.since is not None and absence.since is None:
                self._tell(f"Ray's head at {self._address} answers again, after {now - before.since:.0f} s")

    def _answers(self) -> bool:
        try:
            socket.create_connection((self._host.strip("[]"), self._port), timeout=CONNECT_S).close()
        except OSError:
            return False
        return True
