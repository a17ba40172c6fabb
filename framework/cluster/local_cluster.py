"""Local cluster: a private Ray cluster whose nodes are real raylets on this one machine.

    start:  warden (gcs_server, zygote) || import ray  ->  session facts into GCS  ->  all raylets at once  ->  registered
            everything below the warden dies with this process, whatever ends it

Ray's own start-up programs are not used: they start four Python helpers per node (agents, dashboard, monitors), one node
after the other, which is most of the seconds and megabytes. Here the two native programs that make a cluster are
started directly, with what the helpers would have told them written down beforehand. So there are no
runtime environments and no metrics agent here; a real cluster has both.

Rule of this file: it starts and ends. What can be done to the nodes meanwhile is in `framework/cluster/machines.py`, who keeps them is
`framework/cluster/warden.py`, what is started is in `framework/cluster/raylets.py`, what runs there comes through `framework/cluster/cluster.py`.
It imports Ray late: to start the cluster's processes first and import while they start is most of the speed.
"""

from __future__ import annotations

import fcntl
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
from typing import IO, Any, TypeVar

from framework.cluster.machines import CONTROL, Machines
from framework.cluster.nodes import DOMAIN_LABEL, ClusterError
from framework.cluster.raylets import FIRST_JOB, HEAD, HEAD_IP, HERE, environment, gcs_command, template, zygote_command

PREFIX = "holdfast-"
SHM = Path("/dev/shm")
ENTERED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", CONTROL)
MAX_FOLDER_CHARS = 60  # AF_UNIX paths end at 107
T = TypeVar("T")
PRELOAD = (
    "ray",
    "ray._private.node",
    "ray._private.arrow_serialization",
    "ray._common.usage.usage_lib",
    "ray._common.pydantic_compat",
    "pydantic.v1",
    "pyarrow.json",
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "framework.cluster.cluster",
    "framework.worker",
    "framework.agent",
    "framework.controller",
)


class LocalCluster:
    """Nodes `n0`, `n1`, ... as raylets with `workers_per_node` CPUs each, and a head without any.

    `address` is what Ray connects to, `control` what `Machines` does, `timings` the parts of the start-up in seconds.
    """

    def __init__(self, *, folder: Path, warden: subprocess.Popen[bytes], head_id: str, began: float) -> None:
        self.folder, self._warden, self._head_id, self._began = folder, warden, head_id, began
        self.control = str(folder / "control")
        self.machines = Machines(self.control)
        self.address = ""
        self.timings: dict[str, float] = {}
        self._outside: dict[str, str | None] = {}

    @classmethod
    def begin(cls, *, preload: Sequence[str] = PRELOAD) -> LocalCluster:
        """Set going what takes longest, the zygote's imports, and return at once. `raise_nodes` does the rest."""
        began = time.monotonic()
        reap_dead()
        cluster = cls._open_warden(preload, began)
        cluster._mark("warden_s")
        return cluster

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
        """`begin` and `raise_nodes` in one. Raises ClusterError, and leaves nothing."""
        cluster = cls.begin(preload=preload)
        try:
            cluster.raise_nodes(
                num_nodes=num_nodes + spare_nodes,
                workers_per_node=workers_per_node,
                gpus_per_node=gpus_per_node,
                domains=domains or {},
                timeout_s=start_timeout_s,
            )
        except BaseException:
            cluster.close()
            raise
        return cluster

    def raise_nodes(
        self, *, num_nodes: int, workers_per_node: int, gpus_per_node: float, domains: Mapping[str, str], timeout_s: float
    ) -> None:
        """Returns when the head and every node are registered. Raises ClusterError, with the last words of who failed."""
        deadline = time.monotonic() + timeout_s
        self.enter()  # imports ray, while the warden's children start
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        self._mark("import_ray_s")
        port = self._until(deadline, "GCS", lambda: _read(self.folder / f"gcs_server_port_{self._head_id}"))
        self.address = f"{HEAD_IP}:{port}"
        gcs = GcsClient(address=self.address)
        _write_session(gcs, self.folder.name)
        self._mark("gcs_s")
        words = template(self.folder, self.address, gcs.cluster_id.hex(), self._head_id)
        names = [f"n{number}" for number in range(num_nodes)]
        share = {"CPUS": str(workers_per_node), "GPUS": str(gpus_per_node), "MEMORY": str(_memory_bytes() // max(1, num_nodes))}
        labels = {name: json.dumps({DOMAIN_LABEL: domains[name]} if name in domains else {}) for name in names}
        words["default"] = share
        words["nodes"] |= {n: {**share, "IP": _ip(i), "LABELS": labels[n]} for i, n in enumerate(names)}
        self._until(deadline, "warden", lambda: Path(self.control).exists())
        self.machines.configure(words)
        for name in (HEAD, *names):
            self.machines.launch(name)
        self._until(deadline, "raylets", lambda: _num_alive(gcs) > num_nodes)
        self._mark("raylets_s")

    def close(self) -> None:
        """End every process and remove every file. May be called twice."""
        if self._warden.stdin is not None and not self._warden.stdin.closed:
            self._warden.stdin.close()
        try:
            self._warden.wait(15.0)
        except subprocess.TimeoutExpired:
            self._warden.kill()
            self._warden.wait()
        for folder in (self.folder, SHM / self.folder.name):
            shutil.rmtree(folder, ignore_errors=True)
        for name, value in self._outside.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._outside = {}

    def enter(self) -> None:
        """Let this process speak to the cluster: its token, and no other cluster's address."""
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        self._outside = {name: os.environ.pop(name, None) for name in ENTERED}
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(self.folder / "token"))
        os.environ[CONTROL] = self.control
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    @classmethod
    def _open_warden(cls, preload: Sequence[str], began: float) -> LocalCluster:
        shm = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHM))
        folder = Path(_base()) / shm.name
        folder.mkdir(mode=0o700)
        head_id = os.urandom(28).hex()
        for name in ("empty", "logs"):
            (folder / name).mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        spec = {
            "dir": str(folder),
            "shm": str(shm),
            "env": environment(folder),
            "gcs": gcs_command(folder, head_id),
            "zygote_env": {"RAY_JOB_ID": FIRST_JOB},
            "zygote": zygote_command(folder, preload, f"{__name__}:after_fork"),
        }
        with _lease(shm, folder) as lease:
            warden = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HERE / "warden.py")], stdin=subprocess.PIPE, cwd="/",
                start_new_session=True, pass_fds=(lease.fileno(),),
            )  # fmt: skip
        assert warden.stdin is not None
        warden.stdin.write(json.dumps(spec).encode() + b"\n")
        warden.stdin.flush()
        return cls(folder=folder, warden=warden, head_id=head_id, began=began)

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
    for shm in SHM.glob(PREFIX + "*"):
        try:
            lease = (shm / "lease").open("r+")
        except OSError:
            continue  # being made, or somebody else's
        with lease:
            try:
                fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # alive
            folder = Path(lease.read())
            if folder.name == shm.name:
                shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(shm, ignore_errors=True)
            removed.append(str(folder))
    return tuple(removed)


def _lease(shm: Path, folder: Path) -> IO[str]:
    """A locked file, which the warden inherits: while it lives, so does the lock, and no other start takes the cluster for dead."""
    lease = (shm / "lease.new").open("w")
    fcntl.flock(lease, fcntl.LOCK_EX)
    lease.write(str(folder))
    lease.flush()
    (shm / "lease.new").rename(shm / "lease")
    return lease


def _base() -> str:
    base = tempfile.gettempdir()
    return base if len(base) + len("/holdfast-12345678/n1234/raylet") <= MAX_FOLDER_CHARS else "/tmp"


def _ip(number: int) -> str:
    """An address of its own for each node, in the loopback net."""
    return f"127.0.{1 + number // 250}.{1 + number % 250}"


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _write_session(gcs: Any, session: str) -> None:
    """The facts about the session that Ray's start-up program would leave in GCS, and that a connecting process asks for."""
    from ray._common.usage import usage_lib
    from ray._private import ray_constants

    usage_lib.put_cluster_metadata(gcs, ray_init_cluster=False)
    put = gcs.internal_kv_put
    put(b"session_name", session.encode(), False, ray_constants.KV_NAMESPACE_SESSION)
    put(b"webui:url", b"", True, ray_constants.KV_NAMESPACE_DASHBOARD)


def _num_alive(gcs: Any) -> int:
    nodes = gcs.get_all_node_info(timeout=5.0)
    return sum(node.state == 0 for node in nodes.values())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * 3 // 4
