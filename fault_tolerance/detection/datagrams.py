"""Datagrams: small ones that machines send each other one way, and count.

    a --8 datagrams, 0.1 s apart--> b: counts those with the token it was told        no answer, so no other direction is needed

Over TCP a lost direction loses the acknowledgements of the other one, so both look dead; these tell them apart.

Rule of this file: it sends and counts. What the counts mean is judged in `reachability.py`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping

COUNT, APART_S = 8, 0.1
KEPT = 8  # rounds that are remembered
MAX_BYTES = 512


class Datagrams:
    """One machine's end. It counts from a thread until it is closed."""

    def __init__(self, *, host: str) -> None:
        """`host` is the address under which others reach this machine. Raises OSError if no port can be had there."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._heard: dict[str, Counter[str]] = {}
        threading.Thread(target=self._count, daemon=True, name="datagrams").start()

    def listen(self, token: str) -> tuple[str, int]:
        """Count those of a round from now on. Returns where they are to be sent."""
        self._heard[token] = Counter()
        for old in list(self._heard)[:-KEPT]:
            self._heard.pop(old, None)
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def send(self, peers: Mapping[str, tuple[str, int]], *, token: str, name: str) -> int:
        """Send to every peer. Returns how many each was sent; takes under a second."""
        letter = f"{token} {name}".encode()
        for number in range(COUNT):
            if number:
                time.sleep(APART_S)
            for peer in peers.values():
                with contextlib.suppress(OSError):  # no route, or a filter of this machine: it does not come either way
                    self._socket.sendto(letter, peer)
        return COUNT

    def heard(self, token: str) -> dict[str, int]:
        """How many of a round came, by who sent them."""
        return dict(self._heard.get(token, {}))

    def close(self) -> None:
        """No more counting."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, although it says that nothing is connected
        self._socket.close()

    def _count(self) -> None:
        while True:
            try:
                letter = self._socket.recv(MAX_BYTES)
            except ConnectionError:
                continue  # a peer has closed its port meanwhile
            except OSError:
                return
            if not letter and self._socket.fileno() < 0:
                return
            token, _, name = letter.decode(errors="replace").partition(" ")
            counts = self._heard.get(token)
            if counts is not None:
                counts[name] += 1
