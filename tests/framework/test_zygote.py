"""The zygote outlives those who ask it, and those who ask do not rest until a worker exists."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework import zygote

PROGRAM = str(Path(zygote.__file__))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a zygote that listens at `zygote`."""
    (tmp_path / "book" / "exits").mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "zygote"))
    listener.listen(64)
    options = {"listener": listener.fileno(), "book": str(tmp_path / "book"), "preload": [], "after_fork": "gc:collect"}
    process = subprocess.Popen([sys.executable, PROGRAM, "serve", json.dumps(options)], pass_fds=[listener.fileno()])
    yield tmp_path
    assert process.poll() is None, "the zygote has died"
    process.kill()
    process.wait()
    listener.close()


def ask_and_be_killed(place: Path, *, after: str) -> None:
    """What a launcher does, up to some point."""
    request = json.dumps({"argv": [str(place / "worker.py")], "env": dict(os.environ), "cwd": "/"}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.connect(str(place / "zygote"))
        if after == "connect":
            return
        with open(os.devnull, "r+") as null:  # noqa: PTH123
            socket.send_fds(channel, [len(request).to_bytes(8, "little")], [null.fileno()] * 3)
        if after == "half":
            channel.sendall(request[:7])
        if after == "request":
            channel.sendall(request)


def test_launchers_that_are_killed_at_any_moment_do_not_kill_the_zygote(place: Path) -> None:
    """A node was killed while its workers were being started: the answer to a launcher that was gone raised BrokenPipeError, the
    zygote died of it, and with it the requests of all other nodes. Their raylets waited two minutes for workers that nobody
    made: the hang between a plan and its crew.
    """
    (place / "worker.py").write_text("")
    for _ in range(10):
        for after in ("connect", "head", "half", "request"):
            ask_and_be_killed(place, after=after)
    (place / "worker.py").write_text(f"open({str(place / 'lived')!r}, 'w')")
    subprocess.run([sys.executable, PROGRAM, "launch", str(place / "zygote"), str(place / "worker.py")], check=True, timeout=20)
    deadline = time.monotonic() + 20
    while not (place / "lived").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (place / "lived").exists()


def test_a_launcher_asks_again_until_a_worker_exists(tmp_path: Path) -> None:
    """A zygote that died is replaced by another; the launchers whose requests it took with it went away content."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "zygote"))
        listener.listen(4)
        launcher = subprocess.Popen([sys.executable, PROGRAM, "launch", str(tmp_path / "zygote"), "worker.py"])
        for answer in (b"", b"+"):
            listener.settimeout(20.0)
            channel, _ = listener.accept()
            with channel:
                size, fds, _, _ = socket.recv_fds(channel, 8, 3)
                channel.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
                channel.sendall(answer)
                for fd in fds:
                    os.close(fd)
        assert launcher.wait(20.0) == 0
