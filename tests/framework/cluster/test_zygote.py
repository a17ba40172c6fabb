"""The zygote outlives those who ask it, and those who ask do not rest until a worker exists."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.cluster import zygote

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
    (tmp_path / "pid").write_text(str(process.pid))
    yield tmp_path
    assert process.poll() is None, "the zygote has died"
    process.kill()
    process.wait()
    listener.close()


def ask(place: Path, channel: socket.socket, *, until: str, script: str = "worker.py") -> None:
    """What a launcher does, up to some point."""
    request = json.dumps({"argv": [str(place / script)], "env": dict(os.environ), "cwd": "/"}).encode()
    channel.connect(str(place / "zygote"))
    if until == "connect":
        return
    with open(os.devnull, "r+") as null:  # noqa: PTH123
        socket.send_fds(channel, [len(request).to_bytes(8, "little")], [null.fileno()] * 3)
    if until == "half":
        channel.sendall(request[:7])
    if until == "request":
        channel.sendall(request)


def launch(place: Path, script: str = "worker.py") -> list[str]:
    """The command of a launcher."""
    return [sys.executable, PROGRAM, "launch", str(place / "zygote"), str(place / script)]


def leaves(place: Path, mark: str, script: str) -> None:
    """Write a worker's program whose only trace is a file."""
    (place / script).write_text(f"open({str(place / mark)!r}, 'w')")


def appears(path: Path, inside: str = "") -> bool:
    """Whether a file, or something of that pattern inside a folder, is there within 20 seconds."""
    deadline = time.monotonic() + 20
    while not (found := any(path.glob(inside)) if inside else path.exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_launchers_that_are_killed_at_any_moment_do_not_kill_the_zygote(place: Path) -> None:
    """A node was killed while its workers were being started: the answer to a launcher that was gone raised BrokenPipeError, the
    zygote died of it, and with it the requests of all other nodes. Their raylets waited two minutes for workers that nobody
    made: the hang between a plan and its crew.
    """
    (place / "worker.py").write_text("")
    for _ in range(10):
        for until in ("connect", "head", "half", "request"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                ask(place, channel, until=until)
    leaves(place, "lived", "worker.py")
    subprocess.run(launch(place), check=True, timeout=20)
    assert appears(place / "lived")


def test_launchers_that_are_stopped_at_any_moment_hold_nobody_up(place: Path) -> None:
    """A node was frozen while its workers were being started: the zygote, which has one thread, waited for the rest of a
    launcher's request, and no node of the cluster got a worker any more.
    """
    leaves(place, "lived", "worker.py")
    with contextlib.ExitStack() as stack:
        for until in ("connect", "head", "half"):
            ask(place, stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)), until=until)
        subprocess.run(launch(place), check=True, timeout=20)
        assert appears(place / "lived")


def test_a_launcher_that_gave_up_before_its_turn_gets_no_worker(place: Path) -> None:
    """Its raylet has started another: a worker of the first would only be turned away, and cost the busy machine a start."""
    leaves(place, "late", "late.py")
    leaves(place, "lived", "worker.py")
    zygote_pid = int((place / "pid").read_text())
    os.kill(zygote_pid, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        ask(place, channel, until="request", script="late.py")
    os.kill(zygote_pid, signal.SIGCONT)
    subprocess.run(launch(place), check=True, timeout=20)
    assert appears(place / "lived") and not (place / "late").exists()


def test_a_fork_that_dies_before_it_is_a_worker_is_asked_for_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zygote answered as soon as it had forked: of a fork that could not become a worker nobody learned, and its raylet
    waited until its patience of two minutes was over.
    """
    leaves(place, "lived", "worker.py")
    monkeypatch.setenv("HOLDFAST_NODE", "n1")
    (place / "book" / "n1").write_text("in the way of the folder that a fork writes its page into")
    launcher = subprocess.Popen(launch(place), stderr=subprocess.DEVNULL)
    try:
        assert appears(place / "book" / "exits", "[0-9]*")
        assert launcher.poll() is None and not (place / "lived").exists()
        (place / "book" / "n1").unlink()
        assert launcher.wait(20) == 0 and appears(place / "lived")
    finally:  # it asks for ever: a try that failed must not wait for it
        launcher.kill()
        launcher.wait()


def test_a_launcher_asks_again_until_a_worker_exists(tmp_path: Path) -> None:
    """A zygote that died is replaced by another; the launchers whose requests it took with it went away content."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "zygote"))
        listener.listen(4)
        launcher = subprocess.Popen(launch(tmp_path))
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


FORKS = """
import importlib, os
from framework.cluster.local_cluster import PRELOAD
for name in PRELOAD:
    importlib.import_module(name)
from ray import ObjectID
for _ in range(3):
    if os.fork() == 0:
        print(ObjectID.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_workers_that_are_forked_draw_ids_of_their_own() -> None:
    """One of the preloaded modules had drawn an id: all forks drew the same ones after it. Every worker's first id names an object
    that it puts into its node's store to try it: of two that did so at the same moment one died of it, after its raylet had
    been told that it lives, and the actor that it was for never began.
    """
    told = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=True)
    assert len(set(told.stdout.split())) == 3
