"""Cluster: the thin shell over Ray: which nodes there are, actors pinned to them, calls that fail with decoded causes.

    Cluster --nodes()---------> Node, Node, ...              the inventory, 1 ms, to be polled
            --start_worker()--> Remote --call()--> Call      one actor per rank, in its node's placement group
            --workers()-------> the same Remotes             found again by name, by a controller that was restarted

Every actor is named in the run's own namespace and detached, so it lives until the run ends, not until its maker does.
An actor answers in two lanes: "train" (one thread, in order) and "ctl" (answered while a step blocks the other).

Rule of this file: Ray enters the program here and in `framework/local_cluster.py` and nowhere else, and nothing is decided here.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from framework.checkout import code
from framework.host import Host, tail
from framework.local_cluster import HEAD_IP, LocalCluster
from framework.machines import Machines
from framework.nodes import (
    DOMAIN_LABEL,
    NODE_LABEL,
    CallError,
    ClusterError,
    Exit,
    Node,
    RemoteError,
    WorkerDied,
    WorkerUnavailable,
)

__all__ = [
    "Call", "CallError", "Cluster", "ClusterError", "Machines", "Remote", "RemoteError", "WorkerDied", "WorkerUnavailable",
    "tail", "wait_all", "wait_any",
]  # fmt: skip

LANES = {"train": 1, "ctl": 4}
POLL_S = 0.05
EXIT_NEWS_S = 0.3  # Ray sees the closed socket before the node's book has the wait status
REMOTE_ENV = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


@ray.remote(concurrency_groups=LANES, max_task_retries=0)
class Actor:
    """A `Host` with two lanes."""

    def __init__(self, factory: str, payload: dict[str, Any], options: dict[str, Any]) -> None:
        self._host = Host(factory, payload, **options)

    @ray.method(concurrency_group="train")  # type: ignore[misc]
    def train(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Any]:
        """Call the hosted object, in the one training thread."""
        return self._host.call(method, args, options)

    @ray.method(concurrency_group="ctl")  # type: ignore[misc]
    def ctl(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Any]:
        """Call the hosted object, beside the training thread."""
        return self._host.call(method, args, options)

    @ray.method(concurrency_group="ctl")  # type: ignore[misc]
    def own(self, method: str, args: Sequence[Any]) -> tuple[str, Any]:
        """Call the host itself."""
        return "value", getattr(self._host, method)(*args)


class Remote:
    """Handle of one actor; may be passed to other actors."""

    def __init__(self, handle: ActorHandle, *, name: str, node: str) -> None:
        self.handle, self.name, self.node = handle, name, node
        self.worker_id = name.partition(":")[2]

    def call(self, method: str, *args: Any, lane: str = "ctl", **options: Any) -> Call:
        """Call a method of the hosted object. Returns at once."""
        return Call(self, method, getattr(self.handle, lane).remote(method, args, options))

    def ready(self) -> Call:
        """Its result is the process's identity (`Host.identity`); it comes when the constructor has returned."""
        return Call(self, "identity", self.handle.own.remote("identity", ()))

    def redirect(self, path: str) -> Call:
        """Send what the process prints to this file from now on."""
        return Call(self, "redirect", self.handle.own.remote("redirect", (path,)))

    def kill(self) -> None:
        """End the process for good. Does not wait; a process that is stopped dies when it is continued."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handle, no_restart=True)

    @property
    def pid(self) -> int | None:
        """Its process on its node, or None before it has started."""
        return self.facts().get("Pid") or None

    def facts(self) -> dict[str, Any]:
        """Ray's record of the actor: State, Address, Pid, DeathCause, ..."""
        return dict(ray_state.actor_table(self.handle._actor_id.hex()))

    def __repr__(self) -> str:
        return f"Remote({self.name} on {self.node})"


class Call:
    """One call that is under way."""

    def __init__(self, remote: Remote, method: str, reference: ray.ObjectRef) -> None:
        self.remote, self.method, self.reference = remote, method, reference

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self.wait(0.0)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end, however it ends. Returns whether it has ended."""
        done, _ = ray.wait([self.reference], timeout=timeout_s)
        return bool(done)

    def result(self, timeout_s: float | None = None) -> Any:
        """What the method returned.

        Raises TimeoutError, WorkerDied, WorkerUnavailable, or RemoteError with what the method raised.
        """
        try:
            how, value = ray.get(self.reference, timeout=timeout_s)
        except GetTimeoutError:
            raise TimeoutError(f"{self.remote.name}.{self.method}: must answer within {timeout_s} s, it did not") from None
        except RayError as error:
            raise _decoded(self.remote, error) from error
        if how == "raised":
            kind, message, text = value
            raise RemoteError(actor=self.remote.name, node=self.remote.node, kind=kind, message=message, traceback=text)
        return value


def wait_any(calls: Sequence[Call], timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Wait until one has ended. Returns all that have ended by then, and those still under way."""
    return _wait(calls, 1, timeout_s)


def wait_all(calls: Sequence[Call], timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Wait until all have ended, or the time is over."""
    return _wait(calls, len(calls), timeout_s)


class Cluster:
    """One run's view of the cluster. Made by `open` in the driver and by `inside` in an actor."""

    def __init__(
        self, *, run_id: str, address: str, control: str | None, local: LocalCluster | None, facts: Mapping[str, Any]
    ) -> None:
        self.run_id, self.address, self.control = run_id, address, control
        self._local, self._facts = local, dict(facts)
        self._groups: dict[str, PlacementGroup] = {}
        self._lock = threading.Lock()
        self.timings: dict[str, float] = {} if local is None else local.timings

    @classmethod
    def open(
        cls,
        *,
        run_id: str,
        address: str = "local",
        num_nodes: int = 1,
        workers_per_node: int = 1,
        spare_nodes: int = 0,
        gpus_per_worker: float = 0,
        domains: Mapping[str, str] | None = None,
        start_timeout_s: float = 60.0,
        import_paths: Sequence[str] = (),
    ) -> Cluster:
        """The driver's: start a private cluster here (`local`) or join the one at `address`. Raises ClusterError.

        `import_paths` come last on every worker's path: where a user's own model lies.
        """
        if ray.is_initialized():
            raise ClusterError("cluster: this process must not be connected to Ray yet, it is; call ray.shutdown() first")
        facts = {
            "workers_per_node": workers_per_node,
            "gpus_per_worker": gpus_per_worker,
            "import_paths": list(import_paths),
            "domains": dict(domains or {}),
        }
        local = None
        if address == "local":
            local = LocalCluster.start(
                num_nodes=num_nodes,
                spare_nodes=spare_nodes,
                workers_per_node=workers_per_node,
                gpus_per_node=gpus_per_worker * workers_per_node,
                domains=domains,
                start_timeout_s=start_timeout_s,
            )
        began = time.monotonic()
        try:
            _connect(run_id, address if local is None else local.address, local)
        except BaseException:
            if local is not None:
                local.close()
            raise
        cluster = cls(
            run_id=run_id,
            address=address if local is None else local.address,
            control=None if local is None else local.control,
            local=local,
            facts=facts,
        )
        cluster.timings["connect_s"] = time.monotonic() - began
        _put_facts(run_id, {**facts, "address": cluster.address, "control": cluster.control})
        return cluster

    @classmethod
    def inside(cls, run_id: str) -> Cluster:
        """The same, from within an actor of the run. Raises ClusterError if there is no such run."""
        facts = _get_facts(run_id)
        return cls(run_id=run_id, address=facts["address"], control=facts["control"], local=None, facts=facts)

    def close(self) -> None:
        """The driver's: end this run's actors and their reservations, and the cluster if it is a local one."""
        if self._local is None:
            for remote in (*self.workers().values(), *self.vaults().values(), *self._found("controller").values()):
                remote.kill()
            self._remove_groups()
        with contextlib.suppress(Exception):  # a lost cluster must not keep the driver from ending
            ray.shutdown()
        if self._local is not None:
            self._local.close()

    def nodes(self) -> tuple[Node, ...]:
        """All machines, by name; of one that came back, its present life. About 1 ms."""
        draining = set(ray_state.get_draining_nodes())
        rows = sorted(ray.nodes(), key=lambda row: not row["Alive"])
        names = _names(rows)
        newest: dict[str, Node] = {}
        for row, name in zip(rows, names, strict=True):
            newest.setdefault(name, self._node(row, name, draining))
        return tuple(sorted(newest.values(), key=lambda node: _natural(node.name)))

    def require(self, *, num_nodes: int, timeout_s: float) -> tuple[Node, ...]:
        """Wait for that many nodes that can hold `workers_per_node` workers each.

        Raises ClusterError that says what is needed, present and missing.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            nodes, lacks = self.nodes(), {}
            for node in nodes:
                lacks[node.name] = self._lack(node)
            fit = tuple(node for node in nodes if not lacks[node.name])
            if len(fit) >= num_nodes:
                return fit
            if time.monotonic() > deadline:
                raise ClusterError(self._shortage(num_nodes, fit, lacks, timeout_s))
            time.sleep(POLL_S)

    def confirm(self, node: str, *, timeout_s: float = 1.0) -> bool:
        """Whether a machine answers right now, without Ray's patience: its raylet takes a connection, and is not stopped."""
        if self.control is not None:
            with contextlib.suppress(ClusterError):
                machines = Machines(self.control)
                return machines.names().get(node) == "up" and not _is_stopped(machines.pids(node)[:1])
            return False
        found = next((n for n in self.nodes() if n.name == node and n.alive), None)
        if found is None:
            return False
        try:
            with socket.create_connection((found.ip, found.port), timeout=timeout_s):
                return True
        except OSError:
            return False

    def start_controller(self, factory: str, payload: Mapping[str, Any], *, log: str | None = None) -> Remote:
        """The run's controller, which Ray starts again wherever it can if it is lost. On the head, if that is alive."""
        head = next((node for node in self.nodes() if node.head and node.alive), None)
        where = NodeAffinitySchedulingStrategy(head.ray_id, soft=True) if head else "DEFAULT"
        node = head.name if head else ""
        return self._start("controller", node, factory, payload, log, where, num_cpus=0, restarts=-1)

    def find_controller(self, timeout_s: float = 0.0) -> Remote | None:
        """The run's controller, or None if there is none within the time."""
        deadline = time.monotonic() + timeout_s
        while not (found := self._found("controller")) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return next(iter(found.values()), None)

    def start_worker(
        self, node: str, worker_id: str, factory: str, payload: Mapping[str, Any], *, log: str | None = None
    ) -> Remote:
        """An actor in the node's placement group. Returns at once: `ready()` says when it lives. Raises ClusterError."""
        group = self._group(self._alive(node))
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=-1)
        gpus = self._facts["gpus_per_worker"]
        return self._start(f"worker:{worker_id}", node, factory, payload, log, where, num_cpus=1, num_gpus=gpus)

    def start_vault(self, node: str, factory: str, payload: Mapping[str, Any], *, log: str | None = None) -> Remote:
        """The actor that stands for a node. Returns at once. Raises ClusterError if the node is not alive."""
        where = NodeAffinitySchedulingStrategy(self._alive(node).ray_id, soft=False)
        return self._start(f"vault:{node}", node, factory, payload, log, where, num_cpus=0)

    def workers(self) -> dict[str, Remote]:
        """The run's workers that live or are starting, by id."""
        return self._found("worker")

    def vaults(self) -> dict[str, Remote]:
        """The run's node actors that live or are starting, by node."""
        return self._found("vault")

    def drain(self, node: str, *, deadline_s: float) -> None:
        """Give notice to a node, as a cloud does before it takes a machine back. It then shows as `draining`."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(
            self._alive(node).ray_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "holdfast", deadline_ms
        )
        if not accepted:
            raise ClusterError(f"drain: {node} must accept the notice, it answered {why}")

    def call_context(self) -> dict[str, Any]:
        """What a process of this run has to agree with."""
        own = code()
        return {
            "run_id": self.run_id,
            "address": self.address,
            "control": self.control,
            "code_path": own.path,
            "version": own.version,
            "digest": own.digest,
        }

    def _start(
        self,
        name: str,
        node: str,
        factory: str,
        payload: Mapping[str, Any],
        log: str | None,
        where: object,
        *,
        num_cpus: float,
        num_gpus: float = 0,
        restarts: int = 0,
    ) -> Remote:
        options: dict[str, Any] = {
            "name": f"{name}~{secrets.token_hex(3)}",  # a dead actor's name may not be free yet
            "namespace": _namespace(self.run_id),
            "lifetime": "detached",
            "max_restarts": restarts,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "scheduling_strategy": where,
        }
        if self.control is None:  # a local cluster's processes have this environment from the start
            options["runtime_env"] = {"env_vars": {**REMOTE_ENV, "PYTHONPATH": code().path, "HOLDFAST_NODE": node}}
        hosting = {"log": log, "paths": self._facts["import_paths"], "node": node}
        handle = Actor.options(**options).remote(factory, dict(payload), hosting)
        return Remote(handle, name=name, node=node)

    def _found(self, kind: str) -> dict[str, Remote]:
        """Actors of a kind that are not dead, the newest of each name."""
        place = {node.ray_id: node.name for node in self.nodes()}
        found: dict[str, tuple[int, Remote]] = {}
        space = _namespace(self.run_id)
        for row in ray.util.list_named_actors(all_namespaces=True):
            if row["namespace"] != space or not row["name"].startswith(kind):
                continue
            name = row["name"].partition("~")[0]
            with contextlib.suppress(ValueError):  # it died meanwhile
                remote = Remote(ray.get_actor(row["name"], namespace=space), name=name, node="")
                facts = remote.facts()
                if not facts or facts["State"] == "DEAD":
                    continue
                remote.node = place.get(facts["Address"]["NodeID"], _node_in(name))
                if name not in found or facts["StartTime"] > found[name][0]:
                    found[name] = (facts["StartTime"], remote)
        return {remote.worker_id: remote for _, remote in found.values()}

    def _alive(self, name: str) -> Node:
        nodes = self.nodes()
        for node in nodes:
            if node.name == name and node.alive:
                return node
        alive = ", ".join(node.name for node in nodes if node.alive)
        raise ClusterError(f"node: must be alive, got {name}; alive are {alive}")

    def _group(self, node: Node) -> PlacementGroup:
        """The node's reservation: a bundle for each of its workers. Made once per life of a node, found again by name."""
        with self._lock:
            if node.ray_id not in self._groups:
                name = f"{_namespace(self.run_id)}:{node.name}:{node.ray_id[:8]}"
                try:
                    self._groups[node.ray_id] = get_placement_group(name)
                except ValueError:
                    num = self._facts["workers_per_node"]
                    need = {"CPU": 1.0, **({"GPU": self._facts["gpus_per_worker"]} if self._facts["gpus_per_worker"] else {})}
                    self._groups[node.ray_id] = placement_group(
                        [need] * num,
                        strategy="STRICT_PACK",
                        name=name,
                        lifetime="detached",
                        bundle_label_selector=[{"ray.io/node-id": node.ray_id}] * num,
                    )
            return self._groups[node.ray_id]

    def _remove_groups(self) -> None:
        for row in ray.util.placement_group_table().values():
            if row["name"].startswith(_namespace(self.run_id) + ":") and row["state"] != "REMOVED":
                with contextlib.suppress(ValueError):
                    remove_placement_group(get_placement_group(row["name"]))

    def _node(self, row: Mapping[str, Any], name: str, draining: set[str]) -> Node:
        resources, labels = row["Resources"], dict(row.get("Labels") or {})
        dedicated = "node:__internal_head__" in resources and not resources.get("CPU")
        return Node(
            name=name,
            ray_id=row["NodeID"],
            ip=row["NodeManagerAddress"],
            port=row["NodeManagerPort"],
            alive=row["Alive"],
            draining=row["NodeID"] in draining,
            head=dedicated or name == "head",
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            memory_bytes=int(resources.get("memory", 0)),
            labels=labels,
            domain=self._facts["domains"].get(name) or labels.get(DOMAIN_LABEL) or name,
        )

    def _lack(self, node: Node) -> str:
        """Why a node cannot hold its workers, or nothing."""
        workers, gpus = self._facts["workers_per_node"], self._facts["gpus_per_worker"] * self._facts["workers_per_node"]
        if not node.alive:
            return "dead"
        if node.head:
            return "the head, which holds no workers"
        if node.draining:
            return "draining"
        if node.ray_id in self._groups:
            return ""
        free = ray_state.available_resources_per_node().get(node.ray_id, {})
        if free.get("CPU", 0.0) < workers:
            return f"{free.get('CPU', 0.0):g} of {node.cpus:g} CPUs free"
        if free.get("GPU", 0.0) < gpus:
            return f"{free.get('GPU', 0.0):g} of {node.gpus:g} GPUs free"
        return ""

    def _shortage(self, num_nodes: int, fit: Sequence[Node], lacks: Mapping[str, str], timeout_s: float) -> str:
        workers, gpus = self._facts["workers_per_node"], self._facts["gpus_per_worker"]
        each = f"{workers} CPUs" + (f" and {gpus * workers:g} GPUs" if gpus else "")
        present = ", ".join(node.name for node in fit) or "none"
        others = "; ".join(f"{name}: {lack}" for name, lack in lacks.items() if lack)
        return (
            f"cluster.num_nodes: {num_nodes} nodes with {each} each are needed, present {len(fit)} ({present}), missing "
            f"{num_nodes - len(fit)} after {timeout_s:g} s" + (f" ({others})" if others else "")
        )


def _wait(calls: Sequence[Call], num: int, timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    if not calls:
        return (), ()
    references = list({call.reference: None for call in calls})
    ray.wait(references, num_returns=min(num, len(references)), timeout=timeout_s)
    ended = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
    done = tuple(call for call in calls if call.reference in ended)
    return done, tuple(call for call in calls if call.reference not in ended)


def _decoded(remote: Remote, error: RayError) -> CallError:
    """Which of our errors one of Ray's is."""
    who = {"actor": remote.name, "node": remote.node}
    if isinstance(error, ActorUnavailableError):
        return WorkerUnavailable(**who, cause=_first_line(str(error)))
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return RemoteError(**who, kind=type(error.cause).__name__, message=str(error.cause), traceback=str(error))
    if isinstance(error, OutOfMemoryError):
        return WorkerDied(**who, exit=Exit.OOM, cause="Ray ended it because the node is short of memory")
    return WorkerDied(**who, **_death(remote, error))


def _death(remote: Remote, error: RayError) -> dict[str, Any]:
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return {"exit": Exit.INIT, "cause": f"its constructor failed: {_last_line(str(error))}"}
    facts = {}
    with contextlib.suppress(Exception):  # the inventory may be out of reach too; the error itself still tells
        facts = remote.facts()
    cause = facts.get("DeathCause")
    context = cause.actor_died_error_context if cause is not None else None
    reason = context.reason if context is not None else 0
    status = _exit_status(int(facts.get("Pid") or (context.pid if context is not None else 0)))
    text = f"{error} {context.error_message if context is not None else ''}"
    if reason == 3 or _node_is_down(remote.node) or "node died" in text.lower():
        return {"exit": Exit.NODE, "cause": f"node {remote.node} died"}
    if reason == 4:
        return {"exit": Exit.KILLED, "cause": "it was ended by ray.kill"}
    if status is not None:
        return _told_apart(*status)
    if cause is not None and cause.HasField("oom_context"):
        return {"exit": Exit.OOM, "cause": "Ray ended it because the node is short of memory"}
    return {"exit": Exit.UNKNOWN, "cause": _detail(text)}


def _told_apart(exit_code: int, out_of_memory: bool) -> dict[str, Any]:
    if exit_code >= 0:
        return {"exit": Exit.EXITED, "cause": f"exited with code {exit_code}"}
    name = signal.Signals(-exit_code).name
    if out_of_memory and -exit_code == signal.SIGKILL:
        return {"exit": Exit.OOM, "signal": 9, "cause": "killed by signal 9 (SIGKILL) as the kernel ran out of memory"}
    return {"exit": Exit.SIGNAL, "signal": -exit_code, "cause": f"killed by signal {-exit_code} ({name})"}


def _exit_status(pid: int) -> tuple[int, bool] | None:
    control = os.environ.get("HOLDFAST_CONTROL")
    return Machines(control).exit_status(pid, wait_s=EXIT_NEWS_S) if control and pid else None


def _node_is_down(name: str) -> bool:
    control = os.environ.get("HOLDFAST_CONTROL")
    if control:
        with contextlib.suppress(ClusterError):
            return Machines(control).names().get(name) == "dead"
    rows = [row for row in ray.nodes() if row["Alive"]]
    return bool(name) and name not in _names(rows)


def _connect(run_id: str, address: str, local: LocalCluster | None) -> None:
    """Join a cluster from a neutral place, so that nothing of the user's working directory is on a worker's path."""
    if local is not None:
        local.enter()
        os.environ["HOLDFAST_CONTROL"] = local.control
    options: dict[str, Any] = {"_node_ip_address": HEAD_IP} if local is not None else {}
    with _neutral_place(), _kept_signals():
        try:
            ray.init(
                address=address,
                namespace=_namespace(run_id),
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
                **options,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"cluster.address: a Ray cluster must answer at {address}, got: {_first_line(str(error))}") from error


@contextlib.contextmanager
def _neutral_place() -> Iterator[None]:
    """Ray puts the driver's directory and its script's first on every worker's path: make them an empty folder."""
    before, script = os.getcwd(), sys.argv[:1]
    with tempfile.TemporaryDirectory(prefix="holdfast-empty-") as empty:
        os.chdir(empty)
        sys.argv[:1] = [os.path.join(empty, "driver")]
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


def _put_facts(run_id: str, facts: Mapping[str, Any]) -> None:
    import json

    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_facts_key(run_id), json.dumps(facts), overwrite=True)


def _get_facts(run_id: str) -> dict[str, Any]:
    import json

    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(_facts_key(run_id))
    if text is None:
        raise ClusterError(f"run_id: must be a run of this cluster, got {run_id}")
    return dict(json.loads(text))


def _facts_key(run_id: str) -> bytes:
    return f"{_namespace(run_id)}:facts".encode()


def _namespace(run_id: str) -> str:
    return f"holdfast:{run_id}"


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each machine: its label, else Ray's name for it, else its address; told apart by id where two share one."""
    names = [(row.get("Labels") or {}).get(NODE_LABEL) or row.get("NodeName") or row["NodeManagerAddress"] for row in rows]
    alive = [name for name, row in zip(names, rows, strict=True) if row["Alive"]]
    return [f"{n}-{row['NodeID'][:4]}" if alive.count(n) > 1 else n for n, row in zip(names, rows, strict=True)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _node_in(name: str) -> str:
    return name.partition(":")[2].rpartition(".")[0]


def _is_stopped(pids: Sequence[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "TtZX"
    return True


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"


def _detail(text: str) -> str:
    found = re.search(r"exit detail: (.+?)(\. |$)", text, re.DOTALL)
    return _first_line(found.group(1) if found else text)
