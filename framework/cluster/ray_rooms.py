"""Rooms of a cluster: what each node of a Ray cluster that is running can give, asked before anything is started on it.

    holdfast plan --ask--> python -m framework.cluster.ray_rooms ADDRESS ... --joins--> Ray --a task a node--> room.py
                  <-- one line of JSON: who could hold the workers, who has how much, who did not answer

It is asked by a process of its own, because Ray may hang, or end the process that joins it; a plan waits for neither.

Rule of this file: one of the few that Ray enters by. It takes no reservation and starts no actor. The numbers are judged by
`fault_tolerance/snapshots/budget.py`.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framework.cluster.checkout import code
from framework.cluster.nodes import DOMAIN_LABEL, ClusterError
from framework.config import Config

JOIN_S = 20.0
TASK_S = 20.0  # Ray starts a process on each node for it


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a cluster said. `domains` are those of the nodes that could hold the workers, `free` their bytes by pool;
    `silent` says why others' are not known. `gpus_per_worker`: as the cluster would give them, None where nobody could be asked,
    and `refusal` says why.
    """

    domains: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    gpus_per_worker: float | None = None


def ask(config: Config) -> Rooms:
    """Ask the nodes of `cluster.address`. Takes some seconds, and at most `JOIN_S + TASK_S` and a little."""
    cluster = config.cluster
    wish = {
        "address": cluster.address,
        "workers_per_node": cluster.workers_per_node,
        "gpus_per_worker": {"auto": None, "cpu": 0, "cuda": 1}[cluster.device],
        "domain_label": cluster.domains if isinstance(cluster.domains, str) else DOMAIN_LABEL,
    }
    command = [sys.executable, "-m", "framework.cluster.ray_rooms", json.dumps(wish)]
    limit_s = JOIN_S + TASK_S + 15.0
    try:
        done = subprocess.run(command, cwd=code().path, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Rooms(refusal=f"{cluster.address} did not answer within {limit_s:.0f} s")
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        said = done.stderr.strip().splitlines()
        return Rooms(refusal=said[-1] if said else f"the process that asked ended with code {done.returncode}")
    return Rooms(**json.loads(lines[-1]))


def _main(wish: Mapping[str, Any]) -> dict[str, Any]:
    from framework.cluster.cluster import Cluster

    try:
        cluster = Cluster.open(run_id=secrets.token_hex(4), start_timeout_s=JOIN_S, **wish)
    except ClusterError as error:
        return {"refusal": str(error)}
    try:
        fit = cluster.usable()
        free, silent = _rooms({node.name: node.ray_id for node in fit})
        return {"domains": {node.name: node.domain for node in fit}, "free": free, "silent": {**cluster.unfit(), **silent}, "gpus_per_worker": cluster.gpus_per_worker}
    finally:
        cluster.close()


def _rooms(nodes: Mapping[str, str]) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """A task on each node, all at once: what it may still use, or why that is not known."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def room() -> dict[str, int]:
        from fault_tolerance.snapshots import room as here

        return here.room()

    environment = {"env_vars": {"PYTHONPATH": code().path, "PYTHONSAFEPATH": "1"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(room)
    asked = {n: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(i, soft=False)).remote() for n, i in nodes.items()}
    deadline = time.monotonic() + TASK_S
    free, silent = {}, {}
    for node, reference in asked.items():
        try:
            free[node] = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            silent[node] = f"no answer within {TASK_S:.0f} s"
            ray.cancel(reference, force=True)
        except RayError as error:
            silent[node] = _last_line(error)
    return free, silent


def _last_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))), flush=True)
