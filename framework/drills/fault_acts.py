"""Fault acts: what the faults that reach beyond one process do.

    kill_node      power cut: the raylet, its workers and its vault, SIGKILL              (emulated or real machine)
    partition      the machine is frozen for `severity` seconds, and then comes back      (emulated machine)
    preempt        SIGTERM to all that runs there, power cut `severity` seconds later     (emulated; real: SIGTERM only)
    add_node       a dead machine comes back empty, or a new one appears                  (emulated machine)
    corrupt_block  a bit flips in `severity` of the blocks that the node's vault holds of its newest protected snapshot
    slow_link      everything this rank sends goes at `severity` MB/s: the kernel paces its sockets

Rule of this file: it hurts for real, and decides nothing; when and where is `faults.py`'s matter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import psutil

from fault_tolerance.snapshots.vault_client import VaultClient
from fault_tolerance.snapshots.wire import Refused, WireError, local_address
from framework.cluster.machines import CONTROL, Machines

REVIVE_S = 5.0  # a raylet that Ray has given up ends when it hears of it, and is started again by whoever looks after it
PROTECTED_S = 30.0  # how long to wait for a snapshot to be protected before it is damaged


def kill_node(node: str | None) -> None:
    """On an emulated machine its warden pulls the plug; on a real one all processes of this node's Ray are killed."""
    machines, own = _machines(), os.environ.get("HOLDFAST_NODE")
    if machines is not None and (node or own):
        machines.kill(str(node or own))
        return
    raylet = _raylet()
    if raylet is not None:
        kill_tree(raylet)
    os.kill(os.getpid(), signal.SIGKILL)


def partition(node: str | None, *, for_s: float) -> None:
    """Freeze a machine, alive, and let it go on later, when the others have long gone on without it."""
    machines, name = _need_machines("partition"), node or os.environ["HOLDFAST_NODE"]
    machines.later(for_s, "cont", name)
    machines.later(for_s + REVIVE_S, "revive", name)
    machines.stop(name)


def preempt(node: str | None, *, in_s: float) -> None:
    """Notice to everything that runs on a machine, which is taken away when the time is over."""
    machines, own = _machines(), os.environ.get("HOLDFAST_NODE")
    if machines is not None and (node or own):
        machines.later(in_s, "kill", str(node or own))
        told: list[int] = list(machines.workers(str(node or own)))
    else:
        raylet = _raylet()
        told = [p.pid for p in raylet.children() if p.cmdline()[:1] and p.cmdline()[0].startswith("ray::")] if raylet else [os.getpid()]
    for pid in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def add_node(node: str) -> None:
    """Have a machine started, without waiting for it."""
    _need_machines("add_node").launch(node)


def corrupt_block(node: str, *, num_blocks: int, run: str, secret: bytes) -> None:
    """Flip a bit in the first blocks that a vault of this machine holds of its newest protected snapshot.

    Raises WireError or Refused if the vault does not answer.
    """
    client = VaultClient(local_address(run, node), run=run, secret=secret)
    try:
        version = _newest_protected(client)
        blocks = [("data", index) for index in range(num_blocks)] if version["data"] else []
        blocks += [("parity", int(index)) for index in version["parity"]]
        done = 0
        for kind, index in blocks:
            with contextlib.suppress(Refused):  # a block of zeros has no bytes to flip
                client.corrupt(version["generation"], version["step"], kind, index)
                done += 1
            if done == num_blocks:
                return
    finally:
        client.close()


def kill_tree(root: psutil.Process) -> None:
    """SIGKILL a process and all below it, as a power cut would; the caller's own process comes last."""
    root.suspend()
    victims = [p for p in root.children(recursive=True) if p.pid != os.getpid()]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.suspend()
    for victim in [*victims, root]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def _newest_protected(client: VaultClient) -> Mapping[str, Any]:
    """The newest version once it is protected; what is there after a while if it never is."""
    deadline = time.monotonic() + PROTECTED_S
    while True:
        try:
            versions = client.inventory()["versions"]
        except WireError:
            versions = []
        newest: Mapping[str, Any] | None = max(versions, key=lambda v: (v["step"], v["generation"]), default=None)
        if newest is not None and newest["state"] == "protected":
            return newest
        if time.monotonic() > deadline:
            raise Refused("missing", "drill: no protected snapshot to damage")
        time.sleep(0.02)


def _machines() -> Machines | None:
    control = os.environ.get(CONTROL)
    return Machines(control) if control else None


def _need_machines(kind: str) -> Machines:
    machines = _machines()
    if machines is None:
        raise RuntimeError(f"drill.faults.kind: {kind} needs emulated machines, got a real cluster; use cluster.address=local")
    return machines


def _raylet() -> psutil.Process | None:
    return next((p for p in psutil.Process().parents() if p.name() == "raylet"), None)
