"""Probe: what a node can tell of itself, and measure with another one, before anything is trained.

    speeds      a large copy, a matrix product: the best of a few, since a busy machine only ever makes them slower
    ways        a: "send n bytes" -> b: n bytes -> a notes the time          both directions, over TCP, by the nodes' own addresses
    reach       the same with every peer at once and little patience, and datagrams one way (`datagrams.py`)
    clock       read at once; whoever asks knows how long the question took

Rule of this file: it measures. What the numbers mean is judged in `checkup.py` and `reachability.py`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from fault_tolerance.detection.datagrams import Datagrams
from fault_tolerance.detection.reachability import Stage

COPY_BYTES, PRODUCT_SIZE, REPEATS = 32 << 20, 512, 5
LIBRARIES = ("torch", "ray", "numpy")
BACKLOG = 1024  # every other node may ask at once
REACH_BYTES, REACH_S, REACH_THREADS = 64 << 10, 2.5, 64  # many packets, and time for one that is lost and sent again after a second


class Probe:
    """One node's end. It answers peers from a thread until it is closed."""

    def __init__(self, *, host: str) -> None:
        """`host` is the address under which other nodes reach this one. Raises OSError if no port can be had there."""
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
        self._datagrams = Datagrams(host=host)
        self._payload = bytes(COPY_BYTES)
        threading.Thread(target=self._serve, daemon=True, name="probe").start()

    def address(self) -> tuple[str, int]:
        """Where peers ask."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def clock(self) -> float:
        """Seconds since the epoch, by this node."""
        return time.time()

    def versions(self) -> dict[str, str]:
        """Of what must be the same everywhere."""
        return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}

    def limits(self) -> dict[str, float]:
        """Bytes of shared memory and how many are free, bytes of memory free, processors, files that a process may open."""
        shm = os.statvfs(os.environ.get("HOLDFAST_SHM_DIR", "/dev/shm"))
        return {
            "shm_bytes": shm.f_blocks * shm.f_frsize,
            "shm_free_bytes": shm.f_bavail * shm.f_frsize,
            "memory_free_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
            "cores": float(len(os.sched_getaffinity(0))),
            "open_files": float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        }

    def speeds(self) -> dict[str, float]:
        """Bytes per second of a copy, and FLOP per second of a matrix product, with one thread."""
        import torch  # only here: seconds and 200 MB that a node's agent, which may never be asked this, does without

        source, target = torch.zeros(COPY_BYTES, dtype=torch.uint8), torch.zeros(COPY_BYTES, dtype=torch.uint8)
        a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
        copy = min(_timed(lambda: target.copy_(source)) for _ in range(REPEATS))
        product = min(_timed(lambda: a @ a) for _ in range(REPEATS))
        return {"copy_bytes_per_s": COPY_BYTES / copy, "flops_per_s": 2.0 * PRODUCT_SIZE**3 / product}

    def way(self, peer: tuple[str, int], *, num_bytes: int, repeats: int = 3) -> tuple[float, float]:
        """(latency, seconds of `num_bytes`) from a peer to here, each the best of some. Raises OSError if it cannot be reached."""
        with socket.create_connection(peer, timeout=10.0) as channel:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            latency = min(_asked(channel, 1) for _ in range(20)) / 2
            return latency, min(_asked(channel, num_bytes) for _ in range(repeats))

    def ends(self, token: str) -> tuple[tuple[str, int], tuple[str, int]]:
        """Where peers ask, and where they send the datagrams of a round, which are counted from now on."""
        return self.address(), self._datagrams.listen(token)

    def send(self, peers: Mapping[str, tuple[str, int]], *, token: str, name: str) -> int:
        """Send datagrams to all peers; how many to each."""
        return self._datagrams.send(peers, token=token, name=name)

    def heard(self, token: str) -> dict[str, int]:
        """How many datagrams of a round came, by sender."""
        return self._datagrams.heard(token)

    def reach(self, peers: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, float, str]]:
        """Ask all peers for some bytes: how far each question came (a `Stage`), seconds, and what went wrong."""
        with ThreadPoolExecutor(max(1, min(REACH_THREADS, len(peers)))) as pool:
            return dict(zip(peers, pool.map(_reached, peers.values()), strict=True))

    def close(self) -> None:
        """No more answers."""
        self._datagrams.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else it takes one more peer, for the thread waits in it
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(channel,), daemon=True).start()

    def _answer(self, channel: socket.socket) -> None:
        with channel, contextlib.suppress(OSError):
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := _received(channel, 8):
                channel.sendall(memoryview(self._payload)[: int.from_bytes(request, "little")])


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _reached(peer: tuple[str, int]) -> tuple[str, float, str]:
    """A small answer, then a large one. A peer that takes the connection and is slow is asked once more: it may be busy."""
    began, stage, failure = time.perf_counter(), Stage.CONNECT, ""
    for _ in range(2):
        try:
            with socket.create_connection(peer, timeout=REACH_S) as channel:
                stage = Stage.ANSWER
                _asked(channel, 1)
                stage = Stage.DATA
                _asked(channel, REACH_BYTES)
            return str(Stage.DONE), time.perf_counter() - began, ""
        except OSError as error:
            failure = str(error)
            if stage is Stage.CONNECT:
                break
    return str(stage), time.perf_counter() - began, failure


def _asked(channel: socket.socket, num_bytes: int) -> float:
    began = time.perf_counter()
    channel.sendall(num_bytes.to_bytes(8, "little"))
    left = num_bytes
    while left:
        piece = channel.recv(min(left, 1 << 20))
        if not piece:
            raise ConnectionResetError("the peer has closed the connection")
        left -= len(piece)
    return time.perf_counter() - began


def _received(channel: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = channel.recv(size - len(got))
        if not piece:
            return b""
        got += piece
    return got
