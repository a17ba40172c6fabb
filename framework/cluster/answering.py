"""Answering: which machines answer. Nobody waits twice for one that does not.

    ask(names) ---------> all at once, each in a thread of its own: who did not answer in time
    silent -------------> who did not at the last time of asking; asked again in the background until they do

A cluster manager takes up to a minute to notice that a machine is cut off. A machine that is there takes a
connection within a round trip, whatever its load: the kernel does that. The time allows for one lost packet, which is
sent again after a second.

Rule of this file: it asks; what follows from silence is decided elsewhere.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

ASK_AGAIN_S = 2.0
MAX_THREADS = 64


class Answering:
    """`probe(name)` says whether a machine answers; it may block for seconds, and be called from several threads."""

    def __init__(self, probe: Callable[[str], bool]) -> None:
        self._probe = probe
        self._lock = threading.Lock()
        self._silent: set[str] = set()

    @property
    def silent(self) -> frozenset[str]:
        """The machines that did not answer when they were last asked. Does not wait."""
        with self._lock:
            return frozenset(self._silent)

    def ask(self, names: Iterable[str]) -> frozenset[str]:
        """Ask machines now. Returns those that do not answer. Those known to be silent are not waited for."""
        wanted = set(names)
        asked = sorted(wanted - self.silent)
        if len(asked) > 1:
            with ThreadPoolExecutor(min(MAX_THREADS, len(asked))) as pool:
                answers = list(pool.map(self._probe, asked))
        else:
            answers = [self._probe(name) for name in asked]
        for name, answered in zip(asked, answers, strict=True):
            if not answered:
                self._remember(name)
        return frozenset(wanted & self.silent)

    def _remember(self, name: str) -> None:
        with self._lock:
            if name in self._silent:
                return
            self._silent.add(name)
        threading.Thread(target=self._ask_until_it_answers, args=(name,), daemon=True, name=f"asks {name}").start()

    def _ask_until_it_answers(self, name: str) -> None:
        while not self._probe(name):
            time.sleep(ASK_AGAIN_S)
        with self._lock:
            self._silent.discard(name)


def takes_connections(ip: str, port: int, timeout_s: float) -> bool:
    """Whether something at this address takes a connection in time."""
    try:
        with socket.create_connection((ip, port), timeout=timeout_s):
            return True
    except OSError:
        return False
