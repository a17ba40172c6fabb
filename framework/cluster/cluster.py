"""Cluster: the thin shell over Ray: which nodes there are, actors pinned to them, calls that fail with decoded causes.

    Cluster --nodes()---------> Node, Node, ...              the inventory, 1 ms, to be polled
            --start_worker()--> Remote --call()--> Call      one actor per rank, in its node's placement group
            --workers()-------> the same Remotes             found again by name, by a controller that was restarted

Every actor is named in the run's own namespace and detached, so it lives until the run ends, not until its maker does.
An actor answers in two lanes: "train" (one thread, in order) and "ctl" (answered while a step blocks the other).

Rule of this file: one of the few that Ray enters by (with `ray_calls.py`, `ray_session.py`, `local_cluster.py`). It decides nothing.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from framework.cluster.answering import Answering, takes_connections
from framework.cluster.checkout import code
from framework.cluster.host import BESIDE_NICENESS, tail
from framework.cluster.local_cluster import LocalCluster
from framework.cluster.machines import Machines
from framework.cluster.nodes import (
    DOMAIN_LABEL,
    CallError,
    ClusterError,
    Node,
    RemoteError,
    WorkerDied,
    WorkerUnavailable,
    machine_names,
    natural,
    one_life,
)
from framework.cluster.ray_calls import Call, Remote, actor_class, answers, wait_all, wait_any
from framework.cluster.ray_session import connect, forget_facts, get_facts, give_notice, namespace, put_facts
from framework.cluster.raylets import HEAD, HEAD_IP, NCCL_ENV

__all__ = [
    "Call", "CallError", "Cluster", "ClusterError", "Machines", "Node", "Remote", "RemoteError", "WorkerDied",
    "WorkerUnavailable", "answers", "tail", "wait_all", "wait_any",
]  # fmt: skip

POLL_S = 0.05
ACCEPT_S = 0.5
ANSWER_S = 2.0  # of a machine's kernel, one lost packet included
ID_CHARS = 12
PIN = 0.001  # of the resource that every node has one of, and that bears its address
NODE_ID = "ray.io/node-id"  # a label that every node has
REMOTE_ENV = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "RAY_worker_niceness": "0", **NCCL_ENV}


class Cluster:
    """One run's view of the cluster. Made by `open` in the driver and by `inside` in an actor."""

    def __init__(
        self, *, run_id: str, address: str, control: str | None, local: LocalCluster | None, facts: Mapping[str, Any]
    ) -> None:
        self.run_id, self.address, self.control = run_id, address, control
        self._local, self._facts = local, dict(facts)
        self._groups: dict[str, PlacementGroup] = {}
        self._answering = Answering(self._answers)
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
        gpus_per_worker: float | None = 0,
        domains: Mapping[str, str] | None = None,
        domain_label: str = DOMAIN_LABEL,
        start_timeout_s: float = 60.0,
        import_paths: Sequence[str] = (),
        working_dir: str = "",
        early: LocalCluster | None = None,
    ) -> Cluster:
        """The driver's: start a private cluster here (`local`) or join the one at `address`. Raises ClusterError.

        `gpus_per_worker` None: one, if a node of the cluster has enough of them for all of its workers.
        `domains` are those of nodes by name, `domain_label` is the label of nodes that holds it, where nothing else is said.
        `import_paths` come last on every worker's path: where a user's own model lies. `working_dir` is every process's,
        where the machine has it, so that paths mean there what they mean here. `early` is a local cluster that was begun
        before Ray was imported, to save its time.
        """
        if ray.is_initialized():
            raise ClusterError("cluster: this process must not be connected to Ray yet, it is; call ray.shutdown() first")
        facts: dict[str, Any] = {
            "workers_per_node": workers_per_node,
            "gpus_per_worker": gpus_per_worker,
            "import_paths": list(import_paths),
            "working_dir": working_dir,
            "domains": dict(domains or {}),
            "domain_label": domain_label,
        }
        local = None
        if address == "local":
            local = early or LocalCluster.begin()
        began = time.monotonic()
        try:
            if local is not None:
                local.raise_nodes(
                    num_nodes=num_nodes + spare_nodes,
                    workers_per_node=workers_per_node,
                    gpus_per_node=(gpus_per_worker or 0) * workers_per_node,
                    domains=facts["domains"],
                    timeout_s=start_timeout_s,
                )
                address, began = local.address, time.monotonic()
            connect(run_id, address, node_ip=None if local is None else HEAD_IP, timeout_s=start_timeout_s)
        except BaseException:
            if local is not None:
                local.close()
            raise
        control = None if local is None else local.control
        cluster = cls(run_id=run_id, address=address, control=control, local=local, facts=facts)
        if gpus_per_worker is None:
            enough = any(node.alive and node.gpus >= workers_per_node for node in cluster.nodes())
            cluster._facts["gpus_per_worker"] = float(enough)
        cluster.timings["connect_s"] = time.monotonic() - began
        job = ray.get_runtime_context().get_job_id()
        put_facts(run_id, {**cluster._facts, "address": cluster.address, "control": cluster.control, "job": job})
        return cluster

    @classmethod
    def inside(cls, run_id: str) -> Cluster:
        """The same, from within an actor of the run. Raises ClusterError if there is no such run."""
        facts = get_facts(run_id)
        return cls(run_id=run_id, address=facts["address"], control=facts["control"], local=None, facts=facts)

    @property
    def gpus_per_worker(self) -> float:
        """What Ray gives to each worker. Of emulated machines none: it does not know that they share one machine's."""
        return float(self._facts["gpus_per_worker"])

    def close(self) -> None:
        """The driver's: end this run's actors and their reservations, and the cluster if it is a local one."""
        if self._local is None:
            with contextlib.suppress(RayError, RuntimeError):
                self.leave()
        with contextlib.suppress(Exception):  # a lost cluster must not keep the driver from ending
            ray.shutdown()
        if self._local is not None:
            self._local.close()

    def leave(self) -> None:
        """End all that this run has in a cluster which is somebody else's; in its controller the last thing that is done."""
        controllers = self._found("controller")
        for remote in (*self.workers().values(), *self.vaults().values()):
            remote.kill()
        self._remove_groups()
        forget_facts(self.run_id)
        for remote in controllers.values():
            remote.kill()

    def driver_is_gone(self) -> bool:
        """Whether the program that joined the cluster has ended, however it did. A local cluster ends with it anyway."""
        if self.control is not None:
            return False
        job = self._facts.get("job")
        return any(row["JobID"] == job and row["IsDead"] for row in ray_state.job_table())

    def nodes(self) -> tuple[Node, ...]:
        """All machines, by name; of one that came back, its present life. About 1 ms."""
        draining = set(ray_state.get_draining_nodes())
        rows = sorted(one_life(ray.nodes(), _accepts), key=lambda row: not row["Alive"])
        names = machine_names(rows)
        newest: dict[str, Node] = {}
        for row, name in zip(rows, names, strict=True):
            newest.setdefault(name, self._node(row, name, draining))
        return tuple(sorted(newest.values(), key=lambda node: natural(node.name)))

    def require(self, *, num_nodes: int, timeout_s: float) -> tuple[Node, ...]:
        """Wait for that many nodes that can hold `workers_per_node` workers each.

        Raises ClusterError that says what is needed, present and missing.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            nodes, lacks = self._lacks()
            fit = tuple(node for node in nodes if not lacks[node.name])
            if len(fit) >= num_nodes:
                return fit
            if time.monotonic() > deadline:
                raise ClusterError(self._shortage(num_nodes, fit, lacks, timeout_s))
            time.sleep(POLL_S)

    def usable(self) -> tuple[Node, ...]:
        """The nodes that hold, or could hold now, `workers_per_node` workers of this run each."""
        nodes, lacks = self._lacks()
        return tuple(node for node in nodes if not lacks[node.name])

    def unfit(self) -> dict[str, str]:
        """The machines that are alive and could not hold workers of this run now, and why; heads, which never do, left out."""
        nodes, lacks = self._lacks()
        return {node.name: lacks[node.name] for node in nodes if lacks[node.name] and node.alive and not node.head}

    def confirm(self, node: str) -> bool:
        """Whether a machine answers right now, without Ray's patience: its raylet takes a connection, and is not stopped."""
        return not self.unanswering([node])

    def unanswering(self, nodes: Iterable[str]) -> frozenset[str]:
        """Those of some machines that do not answer now. Emulated ones are asked at the warden, which costs no time; real ones
        all at once, and who was silent is asked again in the background.
        """
        if self.control is not None:
            return frozenset(node for node in nodes if not self._answers(node))
        return self._answering.ask(nodes)

    def _answers(self, node: str) -> bool:
        if self.control is not None:
            with contextlib.suppress(ClusterError):
                return Machines(self.control).answers(node)
            return False
        found = None
        with contextlib.suppress(RayError):  # the background may still ask when the cluster is closed
            found = next((n for n in self.nodes() if n.name == node and n.alive), None)
        return found is not None and takes_connections(found.ip, found.port, ANSWER_S)

    def start_controller(self, factory: str, payload: Mapping[str, Any], *, log: str | None = None) -> Remote:
        """The run's controller, which Ray starts again wherever it can if it is lost.

        It begins on the driver's node: the run directory may be on a disk of that machine. Should that machine be lost, another
        one of somebody's cluster starts it again, to end the run in order.
        """
        here = ray.get_runtime_context().get_node_id()
        node, ip = next(((node.name, node.ip) for node in self.nodes() if node.ray_id == here), ("", ""))
        if self.control is None:
            wish = {"label_selector": {NODE_ID: here}, "fallback_strategy": [{"label_selector": {NODE_ID: "!in(none)"}}]}
            return self._start("controller", node, factory, payload, log, None, num_cpus=0, restarts=-1, more=wish)
        where = NodeAffinitySchedulingStrategy(here, soft=True)
        pin = {"resources": {f"node:{ip}": PIN} if ip else {}}  # a soft wish alone is forgotten by a raylet that has just started
        return self._start("controller", node, factory, payload, log, where, num_cpus=0, restarts=-1, more=pin)

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
        give_notice(ray.get_runtime_context().gcs_address, self._alive(node).ray_id, deadline_s=deadline_s)

    def head(self) -> str:
        """The address of Ray's head (its GCS), whatever name the cluster was joined under."""
        return str(ray.get_runtime_context().gcs_address)

    def own_ip(self) -> str:
        """The address under which other nodes reach this process."""
        return str(ray.util.get_node_ip_address())

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
        where: object | None,
        *,
        num_cpus: float,
        num_gpus: float = 0,
        restarts: int = 0,
        more: Mapping[str, Any] | None = None,
    ) -> Remote:
        options: dict[str, Any] = {
            "name": f"{name}~{secrets.token_hex(3)}",  # a dead actor's name may not be free yet
            "namespace": namespace(self.run_id),
            "lifetime": "detached",
            "max_restarts": restarts,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            **({} if where is None else {"scheduling_strategy": where}),
            **(more or {}),
        }
        address = ""
        if self.control is None:  # a local cluster's processes have this environment from the start
            options["runtime_env"] = {"env_vars": {**REMOTE_ENV, "PYTHONPATH": code().path, "HOLDFAST_NODE": node}}
            address = next((found.ip for found in self.nodes() if found.name == node and name != "controller"), "")
        hosting = {
            "log": log,
            "paths": self._facts["import_paths"],
            "working_dir": self._facts["working_dir"],
            "node": node,
            "address": address,
            "niceness": 0 if num_cpus else BESIDE_NICENESS,
        }
        handle = actor_class().options(**options).remote(factory, dict(payload), hosting)
        return Remote(handle, name=name, node=node)

    def _found(self, kind: str) -> dict[str, Remote]:
        """Actors of a kind that are not dead, the newest of each name."""
        place = {node.ray_id: node.name for node in self.nodes()}
        found: dict[str, tuple[int, Remote]] = {}
        space = namespace(self.run_id)
        for row in ray.util.list_named_actors(all_namespaces=True):
            if row["namespace"] != space or not row["name"].startswith(kind):
                continue
            name = row["name"].partition("~")[0]
            with contextlib.suppress(ValueError):  # it died meanwhile
                remote = Remote(ray.get_actor(row["name"], namespace=space), name=name, node="")
                facts = remote.facts()
                if not facts or facts["State"] == "DEAD":
                    continue
                remote.node = place.get(facts["Address"]["NodeID"], _seat_node(name))
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
                name = f"{namespace(self.run_id)}:{node.name}:{node.ray_id[:ID_CHARS]}"
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
                        bundle_label_selector=[{NODE_ID: node.ray_id}] * num,
                    )
            return self._groups[node.ray_id]

    def _remove_groups(self, ids: Collection[str] | None = None) -> None:
        """Give up reservations: all, or those of these lives of machines, which Ray would try to place again for ever, before
        any other.
        """
        for name in self._group_names() if ids is None or ids else ():
            if ids is None or name.rpartition(":")[2] in ids:
                with contextlib.suppress(ValueError):
                    remove_placement_group(get_placement_group(name))

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
            head=dedicated or name == HEAD,
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            memory_bytes=int(resources.get("memory", 0)),
            labels=labels,
            domain=self._facts["domains"].get(name) or labels.get(self._facts["domain_label"]) or name,
        )

    def _reserved(self) -> set[str]:
        """The nodes that this run holds already, by the id in their reservation's name."""
        return {name.rpartition(":")[2] for name in self._group_names()}

    def _group_names(self) -> list[str]:
        """The names of this run's reservations that stand."""
        mine, rows = f"{namespace(self.run_id)}:", ray.util.placement_group_table().values()
        return [str(row["name"]) for row in rows if row["name"].startswith(mine) and row["state"] != "REMOVED"]

    def _lacks(self) -> tuple[tuple[Node, ...], dict[str, str]]:
        """All machines, and what keeps each from holding its workers."""
        reserved, nodes, free = self._reserved(), self.nodes(), ray_state.available_resources_per_node()  # in this order:
        self._remove_groups(reserved - {node.ray_id[:ID_CHARS] for node in nodes if node.alive})  # what is held was alive
        return nodes, {n.name: self._lack(n, free.get(n.ray_id, {}), n.ray_id[:ID_CHARS] in reserved) for n in nodes}

    def _lack(self, node: Node, free: Mapping[str, float], reserved: bool) -> str:
        """Why a node cannot hold its workers, or nothing."""
        workers, gpus = self._facts["workers_per_node"], self._facts["gpus_per_worker"] * self._facts["workers_per_node"]
        if not node.alive:
            return "dead"
        if node.head:
            return "the head, which holds no workers"
        if node.draining:
            return "draining"
        if reserved:
            return ""
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


def _accepts(row: Mapping[str, Any]) -> bool:
    """Whether the raylet of a row of Ray's node table takes a connection."""
    return takes_connections(row["NodeManagerAddress"], row["NodeManagerPort"], ACCEPT_S)


def _seat_node(name: str) -> str:
    """The node in the name of an actor that has not been placed yet: of `worker:n3.1` and `vault:n3` it is n3."""
    kind, _, rest = name.partition(":")
    return rest if kind == "vault" else rest.rpartition(".")[0]
