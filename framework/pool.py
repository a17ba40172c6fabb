"""Pool: the processes that outlive plans, one agent a node and one worker a slot.

Crews come and go; a worker keeps its imports, compiled code and pinned memory, an agent keeps the snapshots. A
controller that is started again finds both by their names.

Rule of this file: it starts, finds and ends processes, and knows no plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from framework.cluster import Call, CallError, Cluster, ClusterError, Remote, tail, wait_any
from framework.nodes import Node, complaint


class PoolError(RuntimeError):
    """A process could not be started, or is not the program that the controller is.

    `complaint` is what the process has against its config, where that is why.
    """

    def __init__(self, message: str, *, complaint: str = "") -> None:
        super().__init__(message)
        self.complaint = complaint


class Pool:
    """Agents by node, workers by id (`<node>.<slot>`)."""

    def __init__(self, cluster: Cluster, *, logs: str, agent: Mapping[str, Any], worker: Mapping[str, Any]) -> None:
        self._cluster, self._logs = cluster, logs
        self._agent_payload, self._worker_payload = dict(agent), dict(worker)
        self.agents: dict[str, Remote] = cluster.vaults()
        self.workers: dict[str, Remote] = cluster.workers()
        self._identity: dict[str, Any] = cluster.call_context()
        self._starting: dict[str, Call] = {}

    def start(self, seats: Sequence[str]) -> None:
        """Start what is missing for these seats (`<node>.<slot>`): workers, and the agents of their nodes. Does not wait.

        A node that dies meanwhile gets nothing: `ensure` finds it missing, and whoever watches nodes learns of it.
        """
        hosts = {node.name: node.ip for node in self._cluster.nodes() if node.alive}
        for seat in seats:
            with contextlib.suppress(ClusterError):
                self._start(seat, hosts)

    def _start(self, seat: str, hosts: Mapping[str, str]) -> None:
        node = seat.rpartition(".")[0]
        if node not in self.agents and node in hosts:
            payload = {**self._agent_payload, "node": node, "host": hosts[node]}
            self.agents[node] = self._cluster.start_vault(node, "framework.agent:Agent", payload, log=self._log("agent", node))
            self._starting[f"agent {node}"] = self.agents[node].ready()
        if seat not in self.workers:
            payload = {**self._worker_payload, "node": node, "name": seat}
            self.workers[seat] = self._cluster.start_worker(
                node, seat, "framework.worker:Worker", payload, log=self._log("worker", seat)
            )
            self._starting[f"worker {seat}"] = self.workers[seat].ready()

    def ensure(self, seats: Sequence[str], *, timeout_s: float) -> dict[str, float]:
        """Have a live agent on every node and a live worker in every seat.

        Returns how long each new one took, in seconds. Raises PoolError, naming who is missing and the last lines
        of its log.
        """
        began = time.monotonic()
        self.start(seats)
        if missing := [seat for seat in seats if seat not in self.workers or seat.rpartition(".")[0] not in self.agents]:
            raise PoolError(f"cluster: nodes of {', '.join(missing)} must be alive, they died while their workers were started")
        wanted = {f"worker {seat}" for seat in seats} | {f"agent {seat.rpartition('.')[0]}" for seat in seats}
        took: dict[str, float] = {}
        while waiting := {call: who for who, call in self._starting.items() if who in wanted}:
            done, _ = wait_any(list(waiting), max(0.0, timeout_s - (time.monotonic() - began)))
            if not done:
                names = ", ".join(sorted(waiting.values()))
                raise PoolError(f"cluster.start_timeout_s: {names} must start within {timeout_s:.0f} s, got no answer")
            for call in done:
                who = waiting[call]
                del self._starting[who]
                self._check(who, call)
                took[who] = time.monotonic() - began
        return took

    def is_ready(self, seats: Sequence[str]) -> bool:
        """Whether workers of these seats, and the agents of their nodes, have started."""
        names = {f"worker {seat}" for seat in seats} | {f"agent {seat.rpartition('.')[0]}" for seat in seats}
        known = {f"worker {seat}" for seat in self.workers} | {f"agent {node}" for node in self.agents}
        if not names <= known:
            return False
        starting = {who: call for who, call in self._starting.items() if who in names}
        if not all(call.done() for call in starting.values()):
            return False
        for who, call in starting.items():
            try:
                call.result(0)
            except CallError:  # it died before it was of use: whoever asks next finds it missing, and starts another
                self._drop(who)
                return False
        return True

    def forget(self, worker: str | None = None, *, node: str | None = None) -> None:
        """A process is gone: a worker by its id, or all of a node."""
        if worker is not None:
            self.workers.pop(worker, None)
            self._starting.pop(f"worker {worker}", None)
        if node is not None:
            for remote in self._on(node):
                remote.kill()  # should the machine be there again, nothing of its former life is
            self.forget_agent(node)
            for seat in [s for s in self.workers if s.rpartition(".")[0] == node]:
                self.forget(seat)

    def forget_agent(self, node: str) -> None:
        """A node's agent is gone, its workers are not."""
        self.agents.pop(node, None)
        self._starting.pop(f"agent {node}", None)

    def reap(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """Forget everything on nodes that are not alive. Returns their names."""
        alive = {n.name for n in nodes if n.alive}
        known = {s.rpartition(".")[0] for s in self.workers} | set(self.agents)
        for node in known - alive:
            self.forget(node=node)
        return tuple(sorted(known - alive))

    def end_workers(self, seats: Sequence[str]) -> None:
        """End workers that are asked to leave."""
        for seat in [seat for seat in seats if seat in self.workers]:
            self.workers[seat].kill()
            self.forget(seat)

    def end_node(self, node: str) -> None:
        """End all that is on a node that leaves, its vault included."""
        if node in self.agents:
            self.agents[node].call("close").wait(1.0)
        self.forget(node=node)

    def _on(self, node: str) -> list[Remote]:
        return [r for s, r in self.workers.items() if s.rpartition(".")[0] == node] + [r for n, r in self.agents.items() if n == node]

    def warm(self, node: str) -> int:
        """How many workers live on a node."""
        return sum(seat.rpartition(".")[0] == node for seat in self.workers)

    def close(self, *, grace_s: float = 3.0) -> None:
        """End all of them: workers first, then the agents with their vaults."""
        for group in (self.workers, self.agents):
            calls = [remote.call("close") for remote in group.values()]
            deadline = time.monotonic() + grace_s
            for call in calls:
                call.wait(max(0.0, deadline - time.monotonic()))
            for remote in group.values():
                remote.kill()
            group.clear()

    def _drop(self, who: str) -> None:
        kind, _, name = who.partition(" ")
        if kind == "agent":
            self.forget_agent(name)
        else:
            self.forget(name)

    def _log(self, kind: str, name: str) -> str:
        return f"{self._logs}/{kind}_{name}.log"

    def _check(self, who: str, ready: Call) -> None:
        kind, _, name = who.partition(" ")
        try:
            identity = ready.result(0)
        except CallError as error:
            self._drop(who)
            message = f"{who} did not start: {error}\n{tail(self._log(kind, name), 5)}".rstrip()
            raise PoolError(message, complaint=complaint(error)) from error
        for key in ("version", "digest"):
            if identity[key] != self._identity[key]:
                raise PoolError(
                    f"{who} runs another program: {key} must be {self._identity[key]}, got {identity[key]} in "
                    f"{identity['code_path']}; install the same holdfast on every node"
                )
