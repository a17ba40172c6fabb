"""Joining Ray, without its side effects: from a neutral folder, with our signal handlers, silent, by an explicit address.

Ray puts the driver's working directory and the folder of its script first on the path of every worker, so that a stray
`launch.py` in a user's folder would be imported there; it installs a SIGTERM handler; and it prints remarks on dead actors
to standard output. None of that happens here.

Rule of this file: one of the few that Ray enters by. It also keeps the facts of a run that an actor needs to find its way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from framework.cluster.nodes import ClusterError

ANSWER_S = 10.0  # a cluster's own port takes connections long before its nodes are there


def namespace(run_id: str) -> str:
    """Where the run's actors have their names."""
    return f"holdfast:{run_id}"


def put_facts(run_id: str, facts: Mapping[str, Any]) -> None:
    """Tell every process of the cluster what this run is."""
    _internal_kv_put(_facts_key(run_id), json.dumps(facts), overwrite=True)


def get_facts(run_id: str) -> dict[str, Any]:
    """What `put_facts` told. Raises ClusterError if there is no such run."""
    text = _internal_kv_get(_facts_key(run_id))
    if text is None:
        raise ClusterError(f"run_id: must be a run of this cluster, got {run_id}")
    return dict(json.loads(text))


def forget_facts(run_id: str) -> None:
    """The run is over: its actors' question who they are has no answer any more."""
    _internal_kv_del(_facts_key(run_id))


def give_notice(gcs_address: str, node_id: str, *, deadline_s: float) -> None:
    """Tell Ray that a node will be taken away, as a cloud does; it then shows as draining. Raises ClusterError."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = int((time.time() + deadline_s) * 1000)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = GcsClient(address=gcs_address).drain_node(node_id, reason, "holdfast", deadline_ms)
    if not accepted:
        raise ClusterError(f"drain: the node must accept the notice, it answered {why}")


def node_id(gcs_address: str, name: str) -> str:
    """Ray's id of the living node of a name. Raises ClusterError. For programs that have not joined the cluster."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    alive = [info for info in GcsClient(address=gcs_address).get_all_node_info(timeout=10.0).values() if info.state == 0]
    for info in alive:
        if info.node_name == name:
            return str(info.node_id.hex())
    raise ClusterError(f"node: must be alive, got {name}; alive are {', '.join(sorted(info.node_name for info in alive))}")


def connect(run_id: str, address: str, *, node_ip: str | None = None, timeout_s: float = 60.0) -> None:
    """Make this process the run's driver. `node_ip` tells which node is this one, if several are on this machine.

    Raises ClusterError.
    """
    _check_address(address, timeout_s=min(timeout_s, ANSWER_S))
    options = {} if node_ip is None else {"_node_ip_address": node_ip}
    ray._private.worker.print_to_stdstream = _quiet
    with _neutral_place(), _kept_signals():
        try:
            ray.init(address, namespace=namespace(run_id), log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ClusterError(f"cluster.address: a Ray cluster must answer at {address}, got: {why}") from error


def _check_address(address: str, *, timeout_s: float) -> None:
    """Ray itself would look for a cluster that is not there for more than a minute before it says so."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"cluster.address: must be local, auto or IP:PORT, got {address}; type the command on a node of the cluster, "
            "or submit it as a job"
        )
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.address: a Ray cluster must answer at {address}, got: {error}; start one with ray start --head"
                ) from error
            time.sleep(0.2)


def _quiet(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        logging.getLogger("holdfast.ray").debug(line)


@contextlib.contextmanager
def _neutral_place() -> Iterator[None]:
    before, script = Path.cwd(), sys.argv[:1]
    with tempfile.TemporaryDirectory(prefix="holdfast-empty-") as empty:
        os.chdir(empty)
        sys.argv[:1] = [str(Path(empty) / "driver")]
        try:
            yield
        finally:
            os.chdir(before)
            sys.argv[:1] = script


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray installs its own SIGTERM handler; the program's must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _facts_key(run_id: str) -> bytes:
    return f"{namespace(run_id)}:facts".encode()
