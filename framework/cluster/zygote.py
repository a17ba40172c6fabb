"""Zygote: one process that has imported everything, from which the workers of a local cluster are forked.

    raylet --exec--> launcher --argv, env, fds--> zygote --fork--> worker   (Ray's own worker program, unchanged)
                     (12 ms, exits)               torch, ray              8 of them share one copy of the libraries

Why: importing torch and its parallel parts costs several seconds of processor per process, and memory once per process; on a
laptop that emulates a cluster that is most of the start-up. A forked worker is ready in tens of milliseconds.

Rule: nothing here may start a thread or connect anywhere before a fork, so Ray and torch are imported and never used.
The folder `book` is the truth about who lives: `book/<node>/<pid>` exists while the worker does, and `book/exits/<pid>` holds
its wait status afterwards, which is how a death is told apart (signal, exit code, out of memory) where Ray only sees a closed socket.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

MAX_REQUEST_BYTES = 1 << 20
RUNTIME_ENV_WORDS = ("--language=", "--serialized-runtime-env-context=")  # Ray's set-up program, which we stand in for, eats these

FIXED_AT_IMPORT = ("RAY_JOB_ID",)  # libraries read these once, when they are loaded, so a fork cannot change them


def launch(address: str, argv: list[str]) -> None:
    """What the raylet executes in place of a worker: hands its command, environment and output files to the zygote."""
    request = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}).encode()
    while not _forked(address, request):
        time.sleep(0.1)  # a zygote that died is replaced; the raylet would wait for the worker, for minutes, all the same


def _forked(address: str, request: bytes) -> bool:
    """Whether the zygote has answered that the worker exists."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(address)
            socket.send_fds(channel, [len(request).to_bytes(8, "little")], [0, 1, 2])
            channel.sendall(request)
            return channel.recv(1) == b"+"
        except FileNotFoundError:
            raise  # the cluster is gone
        except OSError:
            return False


class Caller:
    """A launcher that has connected, and what it has said so far. It may be killed, or stopped with its machine, at any moment."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self.channel, self.fds = channel, list[int]()
        self._size, self._body = -1, b""

    def hear(self) -> dict[str, Any] | None:
        """Read what has come. Returns the request once it is whole and the launcher still waits for an answer.

        Raises OSError or ValueError if nothing sensible will come any more.
        """
        with contextlib.suppress(BlockingIOError):
            if self._size < 0:
                header, self.fds, _, _ = socket.recv_fds(self.channel, 8, 3)
                self._size = int.from_bytes(header, "little")
                if len(header) < 8 or self._size > MAX_REQUEST_BYTES:
                    raise ValueError(f"a request must begin with its length, got {header!r}")
            while piece := self.channel.recv(max(1, self._size - len(self._body))):
                self._body += piece
            raise ConnectionResetError("the launcher is gone")
        return json.loads(self._body) if self._size == len(self._body) else None

    def close(self) -> None:
        """Let go of it. Whoever still waits for the answer hears that none will come."""
        self.channel.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def serve(listener: socket.socket, *, book: Path, preload: list[str], after_fork: str) -> None:
    """Imports `preload`, then forks a worker per request for ever. Ends with its parent, the warden.

    `after_fork` ("module:function") is called in each fork, once it has the environment of its request. A request that needs
    another value of what is fixed at import gets a process of its own, as it would have without a zygote.
    """
    gc.disable()  # a tenth of the imports' time, and what they make stays anyway
    for name in preload:
        _import(name)
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        print(f"zygote: must have one thread to fork, the imports have started {threads - 1} more", file=sys.stderr, flush=True)
    gc.collect()
    gc.enable()
    gc.freeze()  # the collector must not touch, and so copy, the shared pages
    signal.signal(signal.SIGCHLD, lambda *_: _reap(book))
    oom_kills = count_oom_kills()
    (book / "exits" / "oom").write_text(str(oom_kills))
    listener.setblocking(False)
    callers: dict[int, Caller] = {}
    while True:
        poll = select.poll()  # which, unlike epoll, has nothing open that a fork would inherit
        for fd in (listener.fileno(), *callers):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            if fd not in callers:
                with contextlib.suppress(OSError):  # its machine was killed while it asked
                    channel, _ = listener.accept()
                    callers[channel.fileno()] = Caller(channel)
                continue
            try:
                request = callers[fd].hear()
            except (OSError, ValueError):  # the launcher was killed while it spoke, or gave up waiting
                callers.pop(fd).close()
                continue
            if request is None:
                continue
            if _forks():
                listener.close()
                for other in callers.keys() - {fd}:
                    callers[other].close()
                _become_worker(request, callers[fd], book, after_fork)
            callers.pop(fd).close()


def _forks() -> bool:
    """Whether this is the fork. Where none could be made, whoever asked asks again."""
    try:
        return os.fork() == 0
    except OSError as error:  # out of memory or of processes for now
        print(f"zygote: no worker could be forked: {error}", file=sys.stderr, flush=True)
        return False


def count_oom_kills() -> int:
    """Processes this machine's kernel has killed for memory since it booted; -1 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return -1
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), -1)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # the worker that really needs it will say so, with its name
        print(f"zygote: {name} cannot be preloaded: {error!r}", file=sys.stderr, flush=True)


def _become_worker(request: dict[str, Any], caller: Caller, book: Path, after_fork: str) -> None:
    """In the fork: looks in every respect like a process started with this command. Never returns.

    It answers its launcher itself, when nothing of this is left to fail: a fork that dies before is asked for again.
    """
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        page = book / request["env"].get("HOLDFAST_NODE", "") / str(os.getpid())
        page.parent.mkdir(parents=True, exist_ok=True)
        page.touch()
        for fd, target in zip(caller.fds, (0, 1, 2), strict=True):
            os.dup2(fd, target)
        fixed = {name: os.environ.get(name) for name in FIXED_AT_IMPORT}
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = [word for word in request["argv"] if not word.startswith(RUNTIME_ENV_WORDS)]
        caller.channel.send(b"+")
        caller.close()
        if any(request["env"].get(name) != value for name, value in fixed.items()):
            os.execv(sys.executable, [sys.executable, "-P", *sys.argv])  # not one that this zygote can become: the slow way
        module, _, function = after_fork.partition(":")
        getattr(importlib.import_module(module), function)()
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _reap(book: Path) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        with contextlib.suppress(OSError):  # a full disk, or the cluster's folder is being removed: no reason to die of it
            (book / "exits" / f"{pid}").write_text(f"{os.waitstatus_to_exitcode(status)} {count_oom_kills()}")
            for page in book.glob(f"*/{pid}"):
                if page.parent.name != "exits":
                    page.unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch(sys.argv[2], sys.argv[3:])
    else:
        options = json.loads(sys.argv[2])
        serve(
            socket.socket(fileno=options["listener"]),
            book=Path(options["book"]),
            preload=options["preload"],
            after_fork=options["after_fork"],
        )
