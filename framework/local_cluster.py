"""Local cluster: a private Ray cluster whose nodes are real raylets on this one machine.

    start:  warden (gcs_server, zygote) || import ray  ->  session facts into GCS  ->  all raylets at once  ->  registered
            everything below the warden dies with this process, whatever ends it

Ray's own start-up programs are not used: they start four Python helpers per node (agents, dashboard, monitors), one node
after the other, which is most of the seconds and megabytes. Here the two native programs that make a cluster are
started directly, with what the helpers would have told them written down beforehand. So there are no
runtime environments and no metrics agent here; a real cluster has both.

Rule of this file: it starts and ends. What can be done to the nodes meanwhile is in `framework/machines.py`, who keeps them is
`framework/warden.py`, what runs on them comes through `framework/cluster.py`.
Source: the command lines that `ray._private.services` of Ray 2.60 composes.
"""

from __future__ import annotations

import base64
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from framework.machines import Machines
from framework.nodes import DOMAIN_LABEL, ClusterError

HEAD = "head"
HEAD_IP = "127.0.0.2"  # the machine's own loopback net; 127.0.0.1 itself is rewritten by Ray to the address of a network card
PREFIX = "holdfast-"
T = TypeVar("T")
MAX_FOLDER_CHARS = 60  # AF_UNIX paths end at 107
OBJECT_STORE_BYTES = 80_000_000
NO_AGENT_PORT = 1025  # valid, and nobody listens there: agents are neither started nor looked for
FIRST_JOB = "01000000"  # Ray's id of the first driver to connect, which here is the only one
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
SYSTEM_CONFIG = {  # threshold x period above 3 s: on a busy machine a tighter check kills the living
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 4,
}
RAY_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_memory_monitor_refresh_ms": "0",  # it judges the whole machine, which here is not one node's
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_worker_register_timeout_seconds": "120",  # the first workers wait for the zygote's imports
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_BACKEND_LOG_LEVEL": "warning",
}
WORKER_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
PRELOAD = (
    "ray",
    "ray._private.node",
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "framework.cluster",
    "framework.worker",
    "framework.agent",
    "framework.controller",
)


class LocalCluster:
    """Nodes `n0`, `n1`, ... as raylets with `workers_per_node` CPUs each, and a head without any.

    `address` is what Ray connects to, `control` what `Machines` does, `timings` the parts of the start-up in seconds.
    """

    def __init__(self, *, folder: Path, shm: Path, warden: subprocess.Popen[bytes], began: float) -> None:
        self.folder, self._shm, self._warden, self._began = folder, shm, warden, began
        self.control = str(folder / "control")
        self.machines = Machines(self.control)
        self.address = ""
        self.timings: dict[str, float] = {}

    @classmethod
    def start(
        cls,
        *,
        num_nodes: int,
        spare_nodes: int = 0,
        workers_per_node: int = 1,
        gpus_per_node: float = 0,
        domains: Mapping[str, str] | None = None,
        preload: Sequence[str] = PRELOAD,
        start_timeout_s: float = 60.0,
    ) -> LocalCluster:
        """Returns when every raylet is registered. Raises ClusterError, with the last words of who failed."""
        began = time.monotonic()
        reap_dead()
        cluster = cls._open_warden(preload, began)
        try:
            cluster._mark("warden_s")
            cluster._raise_nodes(
                names=[f"n{i}" for i in range(num_nodes + spare_nodes)],
                workers=workers_per_node,
                gpus=gpus_per_node,
                domains=domains or {},
                deadline=began + start_timeout_s,
            )
        except BaseException:
            cluster.close()
            raise
        return cluster

    def close(self) -> None:
        """End every process and remove every file. May be called twice."""
        if self._warden.stdin is not None and not self._warden.stdin.closed:
            self._warden.stdin.close()
        try:
            self._warden.wait(15.0)
        except subprocess.TimeoutExpired:
            self._warden.kill()
            self._warden.wait()
        for folder in (self.folder, self._shm):
            shutil.rmtree(folder, ignore_errors=True)

    def enter(self) -> None:
        """Let this process speak to the cluster: its token, and no other cluster's address."""
        from ray._raylet import AuthenticationTokenLoader, Config

        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(self.folder / "token"))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    @classmethod
    def _open_warden(cls, preload: Sequence[str], began: float) -> LocalCluster:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base()))
        shm = Path("/dev/shm") / folder.name
        for name in ("empty", "logs"):
            (folder / name).mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        (folder / "shm").write_text(str(shm))
        root = Path(__file__).resolve().parent
        spec = {
            "dir": str(folder),
            "shm": str(shm),
            "env": _environment(folder),
            "gcs": _gcs_command(folder),
            "zygote_env": {"RAY_JOB_ID": FIRST_JOB},
            "zygote": [sys.executable, "-P", "-u", str(root / "zygote.py"), "serve", _zygote_options(folder, preload)],
        }
        warden = subprocess.Popen(
            [sys.executable, "-I", "-S", str(root / "warden.py")], stdin=subprocess.PIPE, cwd="/", start_new_session=True
        )
        assert warden.stdin is not None
        warden.stdin.write(json.dumps(spec).encode() + b"\n")
        warden.stdin.flush()
        return cls(folder=folder, shm=shm, warden=warden, began=began)

    def _raise_nodes(
        self, *, names: Sequence[str], workers: int, gpus: float, domains: Mapping[str, str], deadline: float
    ) -> None:
        self.enter()  # imports ray, while the warden's children start
        self._mark("import_ray_s")
        head_id = (self.folder / "head_id").read_text()
        port = self._until(deadline, "GCS", lambda: _read(self.folder / f"gcs_server_port_{head_id}"))
        self.address = f"{HEAD_IP}:{port}"
        from ray._raylet import GcsClient

        gcs = GcsClient(address=self.address)
        _write_session(gcs, self.folder.name)
        self._mark("gcs_s")
        template = _template(self.folder, self.address, gcs.cluster_id.hex(), head_id)
        share = {"CPUS": str(workers), "GPUS": str(gpus), "MEMORY": str(_memory_bytes() // max(1, len(names)))}
        ips = {name: f"127.0.1.{i + 1}" if i < 250 else f"127.0.2.{i - 249}" for i, name in enumerate(names)}
        template["default"] = share
        for name in names:
            labels = {DOMAIN_LABEL: domains[name]} if name in domains else {}
            template["nodes"][name] = {**share, "IP": ips[name], "LABELS": json.dumps(labels)}
        self._until(deadline, "warden", lambda: self._tell_template(template))
        for name in (HEAD, *names):
            self.machines._ask("add", node=name)
        self._until(deadline, "raylets", lambda: _num_alive(gcs) >= len(names) + 1)
        self._mark("raylets_s")

    def _tell_template(self, template: dict[str, object]) -> bool:
        if not Path(self.control).exists():
            return False
        self.machines._ask("template", template=template)
        return True

    def _mark(self, part: str) -> None:
        self.timings[part] = time.monotonic() - self._began - sum(self.timings.values())

    def _until(self, deadline: float, who: str, found: Callable[[], T]) -> T:
        while not (value := found()):
            if self._warden.poll() is not None:
                raise ClusterError(f"cluster.address=local: the warden must live, it ended with {self._warden.returncode}")
            if time.monotonic() > deadline:
                raise ClusterError(f"cluster.start_timeout_s: {who} must come up in time, it did not\n{self._last_words()}")
            time.sleep(0.005)
        return value

    def _last_words(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*/*.log"), *self.folder.glob("**/*.err")]
        texts = {path.relative_to(self.folder): path.read_text(errors="replace")[-800:] for path in logs}
        return "\n".join(f"{path}: {text.strip()}" for path, text in texts.items() if text.strip())


def after_fork() -> None:
    """In a fresh fork of the zygote: else all workers would draw the same random numbers from numpy."""
    import numpy

    numpy.random.seed()


def reap_dead() -> tuple[str, ...]:
    """Remove what clusters left whose warden was killed. Never touches a living one's. Returns the removed folders."""
    removed = []
    for folder in Path(_base()).glob(PREFIX + "*"):
        try:
            lease = open(folder / "lease", "r+")  # noqa: SIM115
        except OSError:
            continue  # being made, or somebody else's
        with lease:
            try:
                fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # alive
            shm = _read(folder / "shm")
            if shm.startswith("/dev/shm/" + PREFIX):
                shutil.rmtree(shm, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(str(folder))
    return tuple(removed)


def _base() -> str:
    base = tempfile.gettempdir()
    return base if len(base) + len("/holdfast-12345678/n1234/raylet") <= MAX_FOLDER_CHARS else "/tmp"


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _ray_folder() -> Path:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise ClusterError("cluster.address=local: ray must be installed, it is not; run `make env`")
    return Path(spec.origin).parent


def _environment(folder: Path) -> dict[str, str]:
    """What all processes of the cluster see: this one's environment without another cluster's, ours and Ray's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    ours = {"HOLDFAST_CONTROL": str(folder / "control"), "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    path = str(Path(__file__).resolve().parents[1])
    return {**WORKER_ENV, **kept, **RAY_ENV, **ours, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _zygote_options(folder: Path, preload: Sequence[str]) -> str:
    options = {"listener": "@LISTENER@", "book": str(folder / "book"), "preload": list(preload)}
    return json.dumps({**options, "after_fork": "framework.local_cluster:after_fork"})


def _gcs_command(folder: Path) -> list[str]:
    head_id = os.urandom(28).hex()
    (folder / "head_id").write_text(head_id)
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


def _write_session(gcs: object, session: str) -> None:
    """The facts about the session that Ray's start-up program would leave in GCS, and that a connecting process asks for."""
    from ray._common.usage import usage_lib
    from ray._private import ray_constants

    usage_lib.put_cluster_metadata(gcs, ray_init_cluster=False)
    put = gcs.internal_kv_put  # type: ignore[attr-defined]
    put(b"session_name", session.encode(), False, ray_constants.KV_NAMESPACE_SESSION)
    put(b"webui:url", b"", True, ray_constants.KV_NAMESPACE_DASHBOARD)


def _num_alive(gcs: object) -> int:
    nodes = gcs.get_all_node_info(timeout=5.0)  # type: ignore[attr-defined]
    return sum(node.state == 0 for node in nodes.values())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * 3 // 4


def _template(folder: Path, address: str, cluster_id: str, head_id: str) -> dict[str, object]:
    """How the warden makes a raylet of a node's values (NODE, ID, IP, DIR, SHM, CPUS, GPUS, MEMORY, LABELS)."""
    ray = _ray_folder()
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).resolve().parent / "zygote.py"), "launch", f"{folder}/zygote"]
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
    no_agent = '/bin/sh -c "exec sleep infinity" agent'  # a raylet shares the fate of its agents, so it must have some
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
