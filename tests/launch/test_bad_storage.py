"""Real runs whose checkpoints meet a full disk, a read-only one, one that goes away, and an object store that stops."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_tolerance.checkpoints import shelf
from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework import run_dir
from tests.fault_tolerance.checkpoints.saving import free_port
from tests.launch.runs import Run, rows

SMALL = ("layout.pp=1", "layout.dp=2", "cluster.num_nodes=2", "fault_tolerance.durable.every_steps=5", "fault_tolerance.durable.retries=1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def events(run: Run, kind: str, after: float, **wanted: Any) -> list[dict[str, Any]]:
    """Events of a kind that have come since a time."""
    found = [e for e in run_dir.events(run.place) if e["kind"] == kind and e["time"] >= after]
    return [e for e in found if all(e.get(key) == value for key, value in wanted.items())]


def alarm(run: Run, after: float) -> str:
    """The next alarm about checkpoints; training has gone on when it is there, and goes on after it."""
    run.until_true(lambda: bool(events(run, "alarm", after)))
    last = rows(run.place)[-1]["step"]
    run.until(last + 2)
    return str(events(run, "alarm", after)[0]["reason"])


def saved(run: Run, after: float) -> None:
    """The next checkpoint."""
    run.until_true(lambda: bool(events(run, "checkpoint", after, saved=True)))


def whole(root: str) -> list[int]:
    """The steps of all that is visible; each verifies."""
    found = shelf.checkpoints(root)
    assert all(Checkpoint.open(path).verify() == [] for path in found.values())
    return list(found)


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return ballast


@pytest.mark.cluster
def test_a_disk_that_is_full_or_read_only_or_emptied_stops_no_training(tmp_path: Path, disk: Path) -> None:
    root = str(disk / "checkpoints")
    run = Run(tmp_path / "run", *SMALL, "optim.num_steps=50000", f"fault_tolerance.durable.dir={root}", "fault_tolerance.durable.keep_last=1")
    saved(run, 0)

    ballast, began = fill(disk), time.time()
    told = alarm(run, began)
    assert "o space left" in told and root in told and "make room" in told and "training goes on" in told
    assert len(whole(root)) >= 1, "the older one is there, and no half of a newer one"
    ballast.unlink()
    saved(run, time.time())

    began = time.time()
    _patiently(lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True))  # busy while a file is written
    told = alarm(run, began)
    assert "Read-only" in told and "writable" in told
    subprocess.run(["mount", "-o", "remount,rw,size=24m", str(disk)], check=True)
    saved(run, time.time())

    began = time.time()
    shutil.rmtree(root, ignore_errors=True)
    saved(run, began)
    run.process.send_signal(signal.SIGTERM)
    run.wait(130)
    assert len(whole(root)) == 1 and not list(disk.rglob("*.tmp"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """An S3 server on the loopback interface, with a bucket `runs`, in a process that can be killed."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    port = free_port()
    for key, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "t", "AWS_SECRET_ACCESS_KEY": "t", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _patiently(lambda: s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True).mkdir("runs"))
        yield server
    finally:
        server.kill()
        server.wait()


def _patiently(call: Callable[[], Any]) -> None:
    """Until it succeeds, half a minute long."""
    deadline = time.monotonic() + 30
    while True:
        try:
            call()
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.cluster
def test_a_run_goes_on_from_s3_on_another_layout_and_ends_in_time_though_s3_has_stopped(tmp_path: Path, store: subprocess.Popen[bytes]) -> None:
    root = "s3://runs/a"
    Run(tmp_path / "first", *SMALL, "optim.num_steps=6", f"fault_tolerance.durable.dir={root}").wait(0)
    assert whole(root)[-1] == 6
    other = ("layout.pp=2", "layout.dp=1", "cluster.num_nodes=2", "fault_tolerance.durable.every_steps=5", "fault_tolerance.durable.retries=1")
    run = Run(tmp_path / "second", *other, f"resume={root}/step_000006", "optim.num_steps=50000", f"fault_tolerance.durable.dir={root}")
    saved(run, 0)
    assert rows(run.place)[0]["step"] == 7 and rows(run.place)[0]["layout"] == "2x1x1"
    began = time.time()
    store.send_signal(signal.SIGSTOP)
    told = alarm(run, began)
    assert "s3://runs/a" in told and "127.0.0.1" in told and "training goes on" in told
    assert time.time() - began < 100, "an alarm says so in bounded time"
    began = time.time()
    run.process.send_signal(signal.SIGTERM)
    run.wait(130)
    assert time.time() - began < 100, "a store that is silent is not waited for"
    word = str((run_dir.summary(run.place) or {})["reason"])
    assert word.startswith("the last state, of step ") and "was not saved: " in word and "s3://runs/a" in word
