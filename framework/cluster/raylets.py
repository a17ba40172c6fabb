"""Raylets: the command lines of an emulated cluster's native programs, and the environment they and their workers see.

    gcs_server          one, with the health check's patience
    raylet              one per node: --python_worker_command is our launcher, which has the zygote fork a worker
                        its agents are `cat`: it shares their fate, so it must have some; the files in which they would
                        have told their ports are written beforehand

Rule of this file: values in, words out. It imports no Ray and starts nothing.
Source: what `ray._private.services` of Ray 2.60 composes; `tests/framework/cluster/test_local_cluster.py` guards the agreement.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.cluster.machines import CONTROL
from framework.cluster.nodes import ClusterError

HERE = Path(__file__).resolve().parent
HEAD = "head"
HEAD_IP = "127.0.0.2"  # the machine's own loopback net; 127.0.0.1 itself is rewritten by Ray to the address of a network card
OBJECT_STORE_BYTES = 80_000_000
NO_AGENT_PORT = 1025  # valid, and nobody listens there: agents are neither started nor looked for
FIRST_JOB = "01000000"  # Ray's id of the first driver to connect, which here is the only one
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
SYSTEM_CONFIG = {  # threshold x period above 3 s: on a busy machine a tighter check kills the living
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 4,
    "timeout_ms_task_wait_for_death_info": 200,  # a caller's patience with a dead peer before it says "unavailable",
    "core_worker_internal_heartbeat_ms": 200,  # looked at in this rhythm
    "task_events_report_interval_ms": 0,  # for a dashboard, an autoscaler and Ray's own metrics: there is none of them here
    "ray_events_report_interval_ms": 0,
    "report_worker_backlog_interval_ms": 60_000,
    "io_context_monitor_probe_interval_ms": 60_000,
}
RAY_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_memory_monitor_refresh_ms": "0",  # it judges the whole machine, which here is not one node's
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",  # agents end with their raylet, whatever ends it
    "RAY_worker_register_timeout_seconds": "60",  # the first workers wait for the zygote's imports; who gave up is asked for again
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_check_gc_period_milliseconds": "10000",  # these four wake five raylets ten times a second each, for what is
    "RAY_object_manager_timer_freq_ms": "1000",  # never used here: collecting, large objects, pools of idle workers
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "250",
    "RAY_local_fs_monitor_interval_ms": "10000",  # ten times a second each raylet's store asks how full its disk is
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
    "RAY_worker_niceness": "0",  # by default 15: whatever else the machine does would then hold up a rank, and so all of them
    "RAY_DEDUP_LOGS": "0",
    "RAY_BACKEND_LOG_LEVEL": "warning",
}
NCCL_ENV = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}  # by default its watchdog ends a process whose peer is lost; we go on with it
WORKER_ENV = {
    **NCCL_ENV,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # the zygote may have no second thread
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}


def _ray_folder() -> Path:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise ClusterError("cluster.address=local: ray must be installed, it is not; run `make env`")
    return Path(spec.origin).parent


def environment(folder: Path) -> dict[str, str]:
    """What all processes of the cluster see: this one's environment without another cluster's, ours and Ray's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    ours = {CONTROL: str(folder / "control"), "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    return {**WORKER_ENV, **kept, **RAY_ENV, **ours, "PYTHONPATH": str(HERE.parents[1]), "PYTHONSAFEPATH": "1"}


def zygote_command(folder: Path, preload: Sequence[str], after_fork: str) -> list[str]:
    """What starts the process that workers are forked from. The warden puts the listening socket in."""
    options = {"listener": "@LISTENER@", "book": str(folder / "book"), "preload": list(preload), "after_fork": after_fork}
    return [sys.executable, "-P", "-u", str(HERE / "zygote.py"), "serve", json.dumps(options)]


def gcs_command(folder: Path, head_id: str) -> list[str]:
    """What starts the head's table of everything. It writes its port to `gcs_server_port_<head id>` in the folder."""
    config = base64.b64encode(json.dumps(SYSTEM_CONFIG).encode()).decode()
    return [
        str(_ray_folder() / "core/src/ray/gcs/gcs_server"),
        f"--log_dir={folder}/logs",
        f"--config_list={config}",
        "--gcs_server_port=0",
        f"--metrics-agent-port={NO_AGENT_PORT}",
        f"--node-ip-address={HEAD_IP}",
        f"--session-name={folder.name}",
        f"--session-dir={folder}",
        f"--node-id={head_id}",
        f"--stdout_filepath={folder}/logs/gcs.out",
        f"--stderr_filepath={folder}/logs/gcs.err",
    ]


def template(folder: Path, address: str, cluster_id: str, head_id: str) -> dict[str, Any]:
    """How the warden makes a raylet of a node's values (NODE, ID, IP, DIR, SHM, CPUS, GPUS, MEMORY, LABELS)."""
    ray = _ray_folder()
    launcher = [sys.executable, "-I", "-S", str(HERE / "zygote.py"), "launch", f"{folder}/zygote"]
    worker = [
        *launcher,
        str(ray / "_private/workers/default_worker.py"),
        "--node-ip-address=@IP@",
        "--node-manager-port=RAY_NODE_MANAGER_PORT_PLACEHOLDER",
        "--object-store-name=@DIR@/store",
        "--raylet-name=@DIR@/raylet",
        "--redis-address=None",
        f"--metrics-agent-port={NO_AGENT_PORT}",
        f"--runtime-env-agent-port={NO_AGENT_PORT}",
        f"--gcs-address={address}",
        f"--session-name={folder.name}",
        "--temp-dir=@DIR@",
        "--webui=",
        f"--cluster-id={cluster_id}",
        "RAY_WORKER_DYNAMIC_OPTION_PLACEHOLDER",
    ]
    no_agent = '/bin/sh -c "exec cat >/dev/null" agent'  # a raylet shares the fate of its agents, so it must have some
    argv = [
        str(ray / "core/src/ray/raylet/raylet"),
        "--node_id=@ID@",
        "--node-name=@NODE@",
        "--node_ip_address=@IP@",
        "--raylet_socket_name=@DIR@/raylet",
        "--store_socket_name=@DIR@/store",
        *(f"--{name}=0" for name in ("object_manager_port", "node_manager_port", "min_worker_port", "max_worker_port")),
        "--maximum_startup_concurrency=8",
        "--num_prestart_python_workers=0",
        "--static_resource_list=node:@IP@,1.0,@HEAD@CPU,@CPUS@,GPU,@GPUS@,memory,@MEMORY@,"
        f"object_store_memory,{OBJECT_STORE_BYTES}",
        f"--object_store_memory={OBJECT_STORE_BYTES}",
        "--plasma_directory=@SHM@",
        "--fallback_directory=@DIR@",
        "--temp_dir=@DIR@",
        f"--session_dir={folder}",
        "--log_dir=@DIR@/logs",
        "--resource_dir=@DIR@/resources",
        f"--metrics-agent-port={NO_AGENT_PORT}",
        f"--metrics_export_port={NO_AGENT_PORT}",
        f"--runtime_env_agent_port={NO_AGENT_PORT}",
        f"--gcs-address={address}",
        f"--session-name={folder.name}",
        f"--cluster-id={cluster_id}",
        "--labels=@LABELS@",
        "--stdout_filepath=@DIR@/raylet.out",
        "--stderr_filepath=@DIR@/raylet.err",
        f"--python_worker_command={subprocess.list2cmdline(worker)}",
        f"--dashboard_agent_command={no_agent}",
        f"--runtime_env_agent_command={no_agent}",
        "@HEADFLAG@",
    ]
    head = {"ID": head_id, "IP": HEAD_IP, "CPUS": "0", "GPUS": "0", "MEMORY": str(1 << 30), "LABELS": "{}"}
    head |= {"HEAD": "node:__internal_head__,1.0,", "HEADFLAG": "--head"}
    return {
        "argv": argv,
        "files": {f"{name}_@ID@": str(NO_AGENT_PORT) for name in AGENT_PORTS},
        "nodes": {HEAD: head},
        "default": {},
    }
