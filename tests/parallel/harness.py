"""A pool of real processes for tests that need ranks: forked from a parent that has torch imported, and used again.

    pool = Pool(8);  pool.run(function, argument, world=4)  ->  [result of rank 0, ..., of rank 3]

`function(store, rank, generation, *arguments)` must be importable by name. Each run is a new generation, in processes
that have lived through the generations before it, as in the product.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch._C._distributed_c10d import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.parallel.ranks"])


class Pool:
    """`size` processes and the store they meet at."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.generation = 0
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def start(self) -> None:
        """Start those processes that are not running."""
        os.environ["OMP_NUM_THREADS"] = "1"
        if len(self._workers) == self.size and all(worker.is_alive() for worker in self._workers):
            return
        self.stop()
        for _ in range(self.size):
            ours, theirs = _context.Pipe()
            worker = _context.Process(target=_serve, args=(theirs, self.store.port), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any, world: int, timeout_s: float = 120.0) -> list[Any]:
        """Run on the first `world` processes. Raises RuntimeError with the traceback of the first rank that failed."""
        self.start()
        self.submit(function, *arguments, world=world)
        outcomes = [self.collect(rank, timeout_s) for rank in range(world)]
        for rank, (error, _) in enumerate(outcomes):
            if error is not None:
                self.stop()
                raise RuntimeError(f"rank {rank} of {world}:\n{error}")
        return [result for _, result in outcomes]

    def submit(self, function: Callable[..., Any], *arguments: Any, world: int) -> None:
        """Start a run without waiting for it."""
        self.start()
        self.generation += 1
        for rank in range(world):
            self._pipes[rank].send((function, rank, self.generation, arguments))

    def collect(self, rank: int, timeout_s: float = 120.0) -> tuple[str | None, Any]:
        """(None, result), or (traceback, None), of a rank."""
        try:
            if self._pipes[rank].poll(timeout_s):
                return self._pipes[rank].recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError):
            self._workers[rank].join(5)
            return f"the process died, exit code {self._workers[rank].exitcode}", None
        return f"no answer within {timeout_s} s", None

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int(self._workers[rank].pid)

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        os.kill(self.pid(rank), signal.SIGKILL)

    def stop(self) -> None:
        """End all processes, by pid."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            worker.join(10)
        self._workers, self._pipes = [], []


def _serve(pipe: Connection, port: int) -> None:
    faulthandler.enable()
    gc.freeze()  # as the product's zygote does: a mesh that closes has the collector look through what was made since, not through torch
    store = TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    while True:
        try:
            function, rank, generation, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = (None, function(store, rank, generation, *arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Poll a condition. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.01)
