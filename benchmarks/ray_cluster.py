"""A Ray cluster as its owner starts it: `ray start`, once on every machine, each with its agents and a token.

    with RayCluster(addresses=["127.0.0.3", "127.0.0.4"]) as ray:      nodes on one machine, an address each
        subprocess.run([holdfast, "train", f"cluster.address={ray.address}"], env=ray.env)
        ray.crash(1)
    with Boxes(4) as boxes, RayCluster(boxes=boxes) as ray: ...        nodes on hosts of their own (`benchmarks/hosts.py`)

Rule of this file: nothing of Holdfast is used; it is what a run joins.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.hosts import Boxes

RAY = str(Path(sys.executable).parent / "ray")
STORE_BYTES = 80_000_000
START_S = 90.0


class RayCluster:
    """Nodes `0..`, the first of which is the head (and works too, unless `head_cpus` is 0). Gone with the context.

    `address` is what `cluster.address` takes; `env` is what the user's shell has set.
    """

    def __init__(
        self, *, addresses: Sequence[str] = (), boxes: Boxes | None = None, num_cpus: int = 1, head_cpus: int | None = None,
        auth: bool = True,
    ) -> None:  # fmt: skip
        self.addresses = [boxes.address(i) for i in range(boxes.num)] if boxes is not None else list(addresses)
        self._boxes = boxes
        self._cpus = [num_cpus if i or head_cpus is None else head_cpus for i in range(len(self.addresses))]
        self._folder = Path("/tmp") / f"hfr{secrets.token_hex(3)}"
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self.address = ""
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HOLDFAST_", "GLOO_")) and k != "PYTHONPATH"}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._folder / "token")}
        self.env = {
            **outside, **(token if auth else {"RAY_AUTH_MODE": "disabled"}), "OMP_NUM_THREADS": "1",
            "RAY_memory_monitor_refresh_ms": "0", "RAY_enable_metrics_collection": "0", "RAY_DISABLE_IMPORT_WARNING": "1",
        }  # fmt: skip

    def __enter__(self) -> RayCluster:
        self._folder.mkdir()
        (self._folder / "token").write_text(secrets.token_hex(32))
        try:
            self._launch(0, "--head", "--port=0", "--include-dashboard=false")
            self.address = self._told(0, rf"{re.escape(self.addresses[0])}:\d+")
            for number in range(1, len(self.addresses)):
                self.start(number)
            for number in range(1, len(self.addresses)):
                self._told(number, "Ray runtime started")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._started):
            self.crash(number)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, number: int) -> None:
        """A machine joins, or comes back. Returns at once."""
        self._launch(number, f"--address={self.address}")

    def crash(self, number: int) -> None:
        """SIGKILL for the raylet of a node and all below it; a host of its own crashes as a whole."""
        process = self._started.pop(number)
        if self._boxes is not None:
            self._boxes.crash(number)
        kill_tree(process.pid)
        process.wait()
        shutil.rmtree(self._folder / str(number), ignore_errors=True)

    def raylet_tree(self, number: int) -> list[psutil.Process]:
        """The processes of a node that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._started[number].pid).children(recursive=True)
        return []

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """A command line, run on a node."""
        return list(argv) if self._boxes is None else self._boxes.command(number, argv)

    def log(self, number: int) -> str:
        """What `ray start` printed on a node."""
        return (self._folder / f"{number}.log").read_text(errors="replace")

    def _launch(self, number: int, *options: str) -> None:
        argv = [
            RAY, "start", "--block", *options, f"--node-ip-address={self.addresses[number]}", f"--num-cpus={self._cpus[number]}",
            f"--temp-dir={self._folder / str(number)}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        with (self._folder / f"{number}.log").open("wb") as log:
            self._started[number] = subprocess.Popen(
                self.command(number, argv), env=self.env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _told(self, number: int, pattern: str) -> str:
        deadline = time.monotonic() + START_S
        while not (found := re.search(pattern, self.log(number))):
            if self._started[number].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start on node {number}: must come up within {START_S:.0f} s, it did not\n{self.log(number)}")
            time.sleep(0.1)
        return found.group()


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it, stopped first so that none starts others or mourns."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        victims = [root]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
                victims += victim.children()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
