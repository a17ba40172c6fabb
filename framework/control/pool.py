"""Pool: the processes that outlive plans, one agent a node and one worker a slot.

Crews come and go; a worker keeps its imports, compiled code and pinned memory, an agent keeps the snapshots. A
controller that is started again finds both by their names.

Rule of this file: it starts, finds and ends processes, and knows no plan.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from framework.cluster.cluster import Call, CallError, Cluster, ClusterError, Remote, tail, wait_all, wait_any
from framework.cluster.nodes import Exit, Node, WorkerDied, complaint

LOOK_S = 1.0  # how often those who wait for a process ask whether its machine still lives
ALIVE_S = 20.0  # an idle process that says nothing for so long is of no use, stopped or swapped out
LATE_S = 20.0  # one that nobody waits for may take so long, or `TIMES` as long as the slowest before it
STUCK_S, TIMES = 8.0, 4.0  # who has not come up for so long, and so many times as long as others of its kind took, does not come


class PoolError(RuntimeError):
    """Processes could not be started. `nodes` are the machines where.

    `misfit`, in one line: why nothing of this run can be started there, however often it is tried: the program that lies there
    is another one, or cannot do what the config asks for.
    """

    def __init__(self, message: str, *, nodes: Sequence[str] = (), misfit: str = "") -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)
        self.misfit = misfit


class Pool:
    """Agents by node, workers by id (`<node>.<slot>`)."""

    def __init__(self, cluster: Cluster, *, logs: str, agent: Mapping[str, Any], worker: Mapping[str, Any]) -> None:
        self._cluster, self._logs = cluster, logs
        self._agent_payload, self._worker_payload = dict(agent), dict(worker)
        self.agents: dict[str, Remote] = cluster.vaults()
        self.workers: dict[str, Remote] = cluster.workers()
        self._identity: dict[str, Any] = cluster.call_context()
        self._starting: dict[str, Call] = {}
        self._began, self._slowest_s = dict[str, float](), dict[str, float]()  # who was started when, and what its kind has taken
        for kind, found in (("agent", self.agents), ("worker", self.workers)):
            for name, remote in found.items():
                if remote.facts().get("State") != "ALIVE":
                    self._await(f"{kind} {name}", remote)
        self.unready: list[PoolError] = []  # of what came to nothing while nobody was kept waiting

    def start(self, seats: Sequence[str]) -> None:
        """Start what is missing for these seats (`<node>.<slot>`): workers, and the agents of their nodes. Does not wait.

        A node that dies meanwhile gets nothing: `ensure` finds it missing, and whoever watches nodes learns of it.
        """
        hosts = {node.name: node.ip for node in self._cluster.nodes() if node.alive}
        for seat in seats:
            with contextlib.suppress(ClusterError):
                self._start(seat, hosts)

    def _start(self, seat: str, hosts: Mapping[str, str]) -> None:
        node = _node(seat)
        if node not in self.agents and node in hosts:
            payload = {**self._agent_payload, "node": node, "host": hosts[node]}
            self.agents[node] = self._cluster.start_vault(node, "framework.agent:Agent", payload, log=self._log("agent", node))
            self._await(f"agent {node}", self.agents[node])
        if seat not in self.workers:
            payload = {**self._worker_payload, "node": node, "name": seat}
            self.workers[seat] = self._cluster.start_worker(
                node, seat, "framework.worker:Worker", payload, log=self._log("worker", seat)
            )
            self._await(f"worker {seat}", self.workers[seat])

    def _await(self, who: str, remote: Remote) -> None:
        self._starting[who], self._began[who] = remote.ready(), time.monotonic()

    def ensure(self, seats: Sequence[str], *, timeout_s: float) -> dict[str, float]:
        """Have a live agent on every node and a live worker in every seat; those that are there already are asked.

        Returns how long each new one took, in seconds. One that stays away although others came up is started anew, once: a
        process that dies before it has registered is missed by nobody. So is one that was started in a former life of its machine.
        Raises PoolError, naming who is missing and the last lines of its log; what did not come up is ended, so that the next
        try begins afresh.
        """
        began = time.monotonic()
        wanted = self._names(seats)
        self.weed(wanted)
        self._start_all(seats)
        took: dict[str, float] = {}
        anew: set[str] = set()
        while waiting := {call: who for who, call in self._starting.items() if who in wanted}:
            left = timeout_s - (time.monotonic() - began)
            if stuck := overdue(waiting.values(), took, timeout_s - left, timeout_s) - anew:
                anew |= stuck
                self._give_up(stuck)
                self._start_all(seats)
                continue
            done, _ = wait_any(list(waiting), max(0.0, min(LOOK_S, left)))
            outlived = {waiting[call] for call in done if _outlived(call)} - anew
            for call in done:
                who = waiting[call]
                if who in outlived:
                    self._forget(who)
                    continue
                del self._starting[who]
                self._check(who, call)
                took[who] = time.monotonic() - began
                self._slowest_s[_kind(who)] = max(took[who], self._slowest_s.get(_kind(who), 0.0))
            if outlived:
                anew |= outlived
                self._start_all(seats)
            if not done:
                self._require_progress(sorted(waiting.values()), timeout_s, late=left <= 0)
        return took

    def weed(self, wanted: Iterable[str] | None = None) -> None:
        """Forget, and end, those who do not answer although they have started: a dead spare, say, that nobody watched."""
        wanted = self._known() if wanted is None else wanted
        remotes = self._remotes()
        calls = {remotes[who].ready(): who for who in wanted if who in remotes and who not in self._starting}
        done, silent = wait_all(list(calls), ALIVE_S)
        for call in (*silent, *(call for call in done if _error(call))):
            self._forget(calls[call])

    def _start_all(self, seats: Sequence[str]) -> None:
        """`start`. Raises PoolError where a node is not there any more."""
        self.start(seats)
        lacking = self._names(seats) - self._known()
        if missing := [seat for seat in seats if f"worker {seat}" in lacking or f"agent {_node(seat)}" in lacking]:
            raise PoolError(f"cluster: nodes of {', '.join(missing)} must be alive, they died while their workers were started")

    def _give_up(self, stuck: Iterable[str]) -> None:
        for who in sorted(stuck):
            text = f"{who}{self._state(who)} does not come up, others did: it is started anew"
            self.unready.append(PoolError(text, nodes=[_node_of(who)]))
            print(f"pool: {text}", flush=True)
            self._forget(who)

    def _is_late(self, who: str) -> bool:
        """Whether it is time to give up a process that nobody waits for."""
        patience_s = max(LATE_S, TIMES * self._slowest_s.get(_kind(who), 0.0))
        return time.monotonic() - self._began[who] > patience_s

    def _remotes(self) -> dict[str, Remote]:
        return {f"worker {s}": r for s, r in self.workers.items()} | {f"agent {n}": r for n, r in self.agents.items()}

    def _state(self, who: str) -> str:
        """What Ray says of a process that has not answered."""
        remote = self._remotes().get(who)
        facts = {} if remote is None else remote.facts()
        return f" ({facts['State']}, pid {facts.get('Pid') or 'unknown'})" if facts.get("State") else ""

    def _require_progress(self, waiting: Sequence[str], timeout_s: float, *, late: bool) -> None:
        """Raises PoolError if there is no use in waiting longer."""
        gone = [who for who in waiting if not self._cluster.confirm(_node_of(who))]
        if not late and not gone:
            return
        words = [f"{who}{self._state(who)}: {tail(self._log(*who.split(' ', 1)), 3)}".rstrip(": ") for who in gone or waiting]
        for who in waiting if late else gone:
            self._forget(who)
        nodes = sorted({_node_of(who) for who in gone or waiting})
        if gone:
            raise PoolError(f"{', '.join(gone)} did not start: the machine does not answer", nodes=nodes)
        raise PoolError(
            f"cluster.start_timeout_s: processes must start within {timeout_s:.0f} s, got no answer from {'; '.join(words)}", nodes=nodes
        )

    def is_ready(self, seats: Sequence[str]) -> bool:
        """Whether workers of these seats, and the agents of their nodes, have started."""
        names = self._names(seats)
        if not names <= self._known():
            return False
        starting = {who: call for who, call in self._starting.items() if who in names}
        if missing := [who for who, call in starting.items() if not call.done()]:
            self._give_up(who for who in missing if self._is_late(who))
            return False
        for who, call in starting.items():
            if error := self._unfit(who, call):  # it died before it was of use: whoever asks next finds it missing, and starts another
                self.unready.append(error)
                self._forget(who)
                return False
        return True

    def not_up(self, seats: Sequence[str]) -> tuple[str, ...]:
        """The processes of these seats that were started and have not answered yet, or are missing."""
        names = self._names(seats)
        waiting = {who for who, call in self._starting.items() if who in names and not call.done()}
        return tuple(sorted(waiting | (names - self._known())))

    def started(self) -> dict[str, Remote]:
        """The workers that have come up, by id."""
        return {s: r for s, r in self.workers.items() if f"worker {s}" not in self._starting or self._starting[f"worker {s}"].done()}

    def forget(self, worker: str | None = None, *, node: str | None = None) -> None:
        """A process is of no more use: a worker by its id, or all of a node. Should it still live, it is ended."""
        if worker is not None:
            _end(self.workers.pop(worker, None), agent=self.agents.get(_node(worker)))
            self._starting.pop(f"worker {worker}", None)
        if node is not None:
            for seat in [s for s in self.workers if _node(s) == node]:
                self.forget(seat)
            self.forget_agent(node)

    def forget_agent(self, node: str) -> None:
        """A node's agent is gone, its workers are not."""
        _end(self.agents.pop(node, None), agent=None)
        self._starting.pop(f"agent {node}", None)

    def _forget(self, who: str) -> None:
        kind, _, name = who.partition(" ")
        if kind == "agent":
            self.forget_agent(name)
        else:
            self.forget(name)

    def _known(self) -> set[str]:
        return set(self._remotes())

    @staticmethod
    def _names(seats: Sequence[str]) -> set[str]:
        return {f"worker {seat}" for seat in seats} | {f"agent {_node(seat)}" for seat in seats}

    def reap(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """Forget everything on nodes that are not alive. Returns their names."""
        alive = {n.name for n in nodes if n.alive}
        known = {_node(seat) for seat in self.workers} | set(self.agents)
        for node in known - alive:
            self.forget(node=node)
        return tuple(sorted(known - alive))

    def end_workers(self, seats: Sequence[str]) -> None:
        """End workers that are asked to leave."""
        for seat in seats:
            self.forget(seat)

    def end_node(self, node: str) -> None:
        """End all that is on a node that leaves, its vault included."""
        if node in self.agents:
            self.agents[node].call("close").wait(1.0)
        self.forget(node=node)

    def warm(self, node: str) -> int:
        """How many workers live on a node."""
        return sum(_node(seat) == node for seat in self.workers)

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

    def _log(self, kind: str, name: str) -> str:
        return f"{self._logs}/{kind}_{name}.log"

    def _check(self, who: str, ready: Call) -> None:
        """Raises PoolError if a process that has answered is of no use."""
        if error := self._unfit(who, ready):
            self._forget(who)
            raise error

    def _unfit(self, who: str, ready: Call) -> PoolError | None:
        """Why a process that has answered is of no use, if so."""
        kind, _, name = who.partition(" ")
        try:
            identity = ready.result(0)
        except (CallError, TimeoutError) as error:
            message = f"{who} did not start: {error}\n{tail(self._log(kind, name), 5)}".rstrip()
            misfit = complaint(error) if isinstance(error, CallError) else ""
            return PoolError(message, nodes=[_node_of(who)], misfit=misfit)
        for key in ("version", "digest"):
            if identity[key] != self._identity[key]:
                text = (
                    f"cluster: every machine must run the controller's program, got {key} {identity[key]} against {self._identity[key]} "
                    f"of {who} in {identity['code_path']}; install the same holdfast on every node"
                )
                return PoolError(text, nodes=[_node_of(who)], misfit=text)
        return None


def overdue(waiting: Iterable[str], took_s: Mapping[str, float], waited_s: float, timeout_s: float) -> frozenset[str]:
    """Who will not come up any more, judged by how long those of its kind took that did. Nobody is judged where none of them
    has come up yet, or too little time is left to start anew: then a busy machine is the better guess.
    """
    if waited_s > timeout_s / 2:
        return frozenset()
    slowest = {kind: max((s for who, s in took_s.items() if who.startswith(kind)), default=math.inf) for kind in ("agent", "worker")}
    return frozenset(who for who in waiting if waited_s >= max(STUCK_S, TIMES * slowest[_kind(who)]))


def _end(remote: Remote | None, *, agent: Remote | None) -> None:
    """End a process that may live on: a machine that was given up may wake up again, and a stopped process dies of a
    signal from its own machine only. Neither may hold the place of its successor.
    """
    if remote is None:
        return
    facts = remote.facts()
    if agent is not None and facts.get("Pid") and facts.get("State") != "DEAD":
        agent.call("kill_pid", facts["Pid"])
    remote.kill()


def _node(seat: str) -> str:
    """n3 of n3.1."""
    return seat.rpartition(".")[0]


def _kind(who: str) -> str:
    """agent or worker."""
    return who.partition(" ")[0]


def _node_of(who: str) -> str:
    name = who.partition(" ")[2]
    return name if _kind(who) == "agent" else _node(name)


def _outlived(call: Call) -> bool:
    """Whether a process is gone because its machine died; the machine may be back."""
    error = _error(call)
    return isinstance(error, WorkerDied) and error.exit is Exit.NODE


def _error(call: Call) -> Exception | None:
    """Why a call that has ended gave nothing, if so."""
    try:
        call.result(0)
    except (CallError, TimeoutError) as error:
        return error
    return None
