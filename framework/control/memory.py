"""Memory: the controller's view of the vaults: what they hold, what they are told, what has happened in them.

    look      every vault's inventory -> catalogue -> the newest snapshot that decodes
    open      a plan's groups and addresses -> every vault makes room, older generations are fenced
    poll      snapshots that became protected or were given up, processes that are gone

Nothing here is needed to read a snapshot again: a controller that is started anew looks, and knows.

Rule of this file: it asks and tells vaults; what decodes is judged by `fault_tolerance/snapshots/catalogue.py`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fault_tolerance.coding.placement import Group, limits, plan_groups
from fault_tolerance.snapshots.budget import VERSIONS, budget, check
from fault_tolerance.snapshots.catalogue import Catalogue, Snapshot, catalogue
from fault_tolerance.snapshots.slab import slab_of
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan, deadline_s
from fault_tolerance.snapshots.vault_client import VaultClient
from fault_tolerance.snapshots.wire import Refused, WireError
from framework.cluster.cluster import CallError, Remote
from framework.config import Config
from framework.control.pool import PoolError
from framework.control.snapshot_log import SnapshotLog
from framework.control.vault_watch import VaultWatch
from framework.plan import Plan, Unfit
from framework.plan import Refused as NoPlan
from framework.planning.overlap import Overlap
from parallel.atlas import Atlas
from parallel.layout import Layout

ASK_S = 5.0
TRIES = 2
SILENT_S = 20.0  # a vault that says nothing for so long is given up; one whose process ended is known at once
OPEN_S = 20.0
PREFAULT_BYTES_S = 100e6  # memory that is touched for the first time, on a machine that does much else


class Memory:
    """The vaults of a run, by node."""

    def __init__(self, config: Config, *, run_id: str, secret: str, atlas: Callable[[Layout, str], Atlas]) -> None:
        self._keeping, self._schedule = config.fault_tolerance, config.layout.schedule
        self._run, self._secret, self._atlas = run_id, bytes.fromhex(secret), atlas
        self._agents: dict[str, Remote] = {}
        self._clients: dict[str, VaultClient] = {}
        self._watches: dict[str, VaultWatch] = {}
        self._silent_s = max(SILENT_S, 3 * config.detect.ping_timeout_s)
        self._catalogue = Catalogue((), ())
        self._rejected: set[tuple[int, int]] = set()
        self._log: SnapshotLog | None = None
        self._polling = threading.Lock()
        self.lost: frozenset[str] = frozenset()
        self.leaving: frozenset[str] = frozenset()
        self.generation = 0
        self._reached = 0

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest snapshot that decodes and has not failed a restore."""
        return next((s for s in self._catalogue.snapshots if s.key not in self._rejected), None)

    @property
    def reasons(self) -> str:
        """Why newer snapshots than the one chosen are not good enough; empty if there are none."""
        found = [f"step {r.step} of generation {r.generation}: {r.reason}" for r in self._catalogue.rejected]
        found += [f"step {step} of generation {generation}: failed a restore" for generation, step in self._rejected]
        return "; ".join(found)

    def look(self, agents: Mapping[str, Remote], *, apart: Collection[str] = ()) -> None:
        """Ask all vaults what they hold. Those of the machines `apart`, which not everybody can reach, count only where the newest
        snapshot cannot be decoded without them.

        A vault on a busy machine that has not answered yet is asked again for as long as nothing as new as the newest
        protected step that was heard of can be decoded without it: too little patience here would lose the state.
        """
        self._connect(agents)
        found: dict[str, Any] = {}
        silent, deadline = set(self._clients), time.monotonic() + self._silent_s
        while silent:
            began = time.monotonic()
            answers = self._all(lambda client: client.inventory(), only=tuple(silent))
            found |= {node: answer for node, answer in answers.items() if answer is not None}
            silent = {node for node in silent if node not in found and time.monotonic() - began > ASK_S}
            self._catalogue = catalogue(found.values(), run=self._run)
            newest = self.snapshot
            if (newest is not None and newest.step >= self._reached) or time.monotonic() > deadline:
                break
        if apart and (newest := self.snapshot) is not None:
            reachable = catalogue((answer for node, answer in found.items() if node not in apart), run=self._run)
            if any(s.key == newest.key for s in reachable.snapshots):
                self._catalogue = reachable
        self.generation = max([self.generation, *(int(i["generation"]) for i in found.values())])

    def reject_newest(self) -> None:
        """The snapshot that was chosen failed its proof: it is never tried again."""
        if self.snapshot is not None:
            self._rejected.add(self.snapshot.key)

    def reject_after(self, step: int) -> None:
        """What was captured after this step is not believed: it is never used."""
        self._rejected |= {s.key for s in self._catalogue.snapshots if s.step > step}

    def holders_gone(self) -> tuple[str, ...]:
        """Nodes that held a part of the chosen snapshot when it was chosen, and whose vaults do not answer any more."""
        held = () if self.snapshot is None else tuple(holder.node for holder in self.snapshot.holders)
        answered = self._all(lambda client: client.status(), only=held)
        return tuple(node for node in held if answered.get(node) is None)

    def overlap(self) -> Overlap | None:
        """What nodes hold of the chosen snapshot, to price seats with; None if there is none."""
        snapshot = self.snapshot
        if snapshot is None:
            return None
        holders = [holder.node for holder in snapshot.holders if holder.data]
        return Overlap(snapshot.plan, holders, lambda layout: self._atlas(layout, self._schedule))

    def open(self, plan: Plan, agents: Mapping[str, Remote]) -> dict[str, Any]:
        """Open a plan on the vaults of its nodes. Returns what its workers must be told.

        Raises PoolError if a vault cannot take it up.
        """
        self._connect(agents)
        if absent := sorted(set(plan.nodes) - set(self._clients)):
            raise PoolError(f"agents of {', '.join(absent)} do not answer")
        base = self.snapshot if plan.source.tier == "memory" else None
        rate = self._keeping.max_rate_mb_s
        snapshots = SnapshotPlan(
            run=self._run,
            generation=plan.generation,
            atlas=self._atlas(plan.layout, plan.schedule),
            seats=plan.node_of_rank,
            groups=self._groups(plan),
            addresses={node: self._clients[node].address for node in plan.nodes},
            chunk_bytes=self._keeping.chunk_bytes,
            max_rate_bytes_s=None if rate is None else rate * 1e6,
            scrub_bytes_s=self._keeping.scrub_mb_s * 1e6,
            base=None if base is None else base.key,
        )
        snapshots = replace(snapshots, deadline_s=deadline_s(snapshots))
        refusals = self._all(lambda client: _opened(client, snapshots), only=plan.nodes)
        refused = {node: refusals.get(node, "no answer") for node in plan.nodes if refusals.get(node, "no answer")}
        if refused:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in sorted(refused.items()))
            raise PoolError(f"vaults did not take up generation {plan.generation}: {reasons}")
        others = tuple(node for node in self._clients if node not in plan.nodes)
        self._all(lambda client: client.fence(plan.generation), only=others)
        self._log, self.lost, self.leaving = SnapshotLog(snapshots, base), frozenset(), frozenset()
        return {"snapshots": snapshots.to_json(), "restore": None if base is None else base.to_json()}

    def poll(self, *, last: bool = False) -> list[dict[str, Any]]:
        """Events on snapshots that have come to an end, and on damage; notes vaults that are gone. Never waits.

        `last`: the generation is over, so each vault is asked once more, and nothing is held back.
        """
        with self._polling:  # the loop polls, and who saves the state while the loop waits for Ray's head
            return self._poll(last)

    def _poll(self, last: bool) -> list[dict[str, Any]]:
        if self._log is None:
            return []
        for node in self._log.plan.nodes:
            watch, client = self._watches.get(node), self._clients.get(node)
            if watch is None or client is None:
                self.lost |= {node}
                continue
            if last and not watch.lost and node not in self.lost:
                with contextlib.suppress(WireError, Refused):
                    watch.catch_up(client)
            for event in watch.events():
                if event["kind"] == "leaving":
                    self.leaving |= {node}
                self._log.hear(node, event)
            if watch.lost:
                self.lost |= {node}
        self._reached = max(self._reached, self._log.protected or 0)
        return [{**event, "tolerance": self.tolerance()} for event in self._log.take(last=last)]

    @property
    def protected(self) -> int | None:
        """The newest step of this generation that any tolerated loss leaves decodable."""
        return None if self._log is None else self._log.protected

    def tolerance(self) -> int:
        """How many more nodes may be lost now, whichever they are, and the state still be decoded."""
        if self._log is not None:
            return self._log.tolerance(self.lost)
        return 0 if self.snapshot is None else self.snapshot.spare

    def limits(self, plan: Plan) -> tuple[str, ...]:
        """What a plan's snapshots cannot survive, in sentences."""
        return () if self._keeping.every_steps == 0 else limits(self._groups(plan), dict(plan.domains))

    def check_room(self, plan: Plan, agents: Mapping[str, Remote]) -> None:
        """Refuse a plan whose snapshots do not fit into the memory that its nodes have free now, with the numbers.

        Raises Refused, Unfit where nothing was trained yet. A node that does not answer is not checked.
        """
        if self._keeping.every_steps == 0:
            return
        calls = {node: agents[node].call("facts") for node in plan.nodes if node in agents}
        facts: dict[str, Mapping[str, Any]] = {}
        deadline = time.monotonic() + ASK_S
        for node, call in calls.items():
            with contextlib.suppress(CallError, TimeoutError):
                facts[node] = call.result(max(0.0, deadline - time.monotonic()))
        atlas = self._atlas(plan.layout, plan.schedule)
        kept = {node: sum(slab_of(atlas, rank).nbytes for rank in plan.ranks_on(node)) for node in plan.nodes}
        needs = budget(self._groups(plan), kept, chunk_bytes=self._keeping.chunk_bytes)
        try:
            check(needs, {n: f["room"] for n, f in facts.items()}, {n: int(f["held_bytes"]) for n, f in facts.items()})
        except ValueError as error:
            refused = Unfit if self.snapshot is None else NoPlan  # nothing was trained yet: the config is at fault
            raise refused(str(error)) from error

    def forget(self, node: str) -> None:
        """A node is gone."""
        self._agents.pop(node, None)
        client, watch = self._clients.pop(node, None), self._watches.pop(node, None)
        if client is not None:
            client.close()
        if watch is not None:
            watch.close()

    def _groups(self, plan: Plan) -> tuple[Group, ...]:
        size = self._keeping.group_size or len(plan.nodes)
        return plan_groups(dict(plan.domains), tolerate=plan.tolerate, group_size=max(size, plan.tolerate + 1))

    def _connect(self, agents: Mapping[str, Remote]) -> None:
        for node in [n for n, agent in self._agents.items() if agents.get(n) is not agent]:
            self.forget(node)  # gone; or it left and came back between two looks, and its vault listens elsewhere
        calls = {node: agent.call("address") for node, agent in agents.items() if node not in self._clients}
        for node, call in calls.items():
            try:
                address = call.result(ASK_S)
            except (CallError, TimeoutError):
                continue  # it is still starting, or gone: the pool knows
            self._agents[node] = agents[node]
            self._clients[node] = VaultClient(address, run=self._run, secret=self._secret, timeout_s=ASK_S)
            self._watches[node] = VaultWatch(address, run=self._run, secret=self._secret, silent_s=self._silent_s)

    def _all(
        self, ask: Callable[[VaultClient], Any], *, only: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Ask many vaults at once. None stands for one that does not answer."""
        clients = {n: c for n, c in self._clients.items() if only is None or n in only}
        if not clients:
            return {}
        with ThreadPoolExecutor(min(64, len(clients))) as pool:
            return dict(zip(clients, pool.map(lambda client: _answer(ask, client), clients.values()), strict=True))


def _opened(client: VaultClient, plan: SnapshotPlan) -> str:
    """Open a plan on a vault. Returns why that was not possible; empty if it was."""
    reason = ""
    for _ in range(TRIES):
        try:
            client.open(plan, timeout_s=_open_s(plan))
            return ""
        except Refused as error:
            return str(error)
        except WireError as error:
            reason = str(error)
    return reason


def _answer(ask: Callable[[VaultClient], Any], client: VaultClient) -> Any:
    for _ in range(TRIES):  # a vault that is gone says so at once; one on a busy machine gets a second chance
        with contextlib.suppress(WireError, Refused):
            return ask(client)
    return None


def _open_s(plan: SnapshotPlan) -> float:
    """How long a vault may take to make room. Without a bound, one that was stopped at this moment would hold all up."""
    needed = [VERSIONS * (plan.node_bytes(n) + plan.group_of(n).m * plan.block_bytes(n)) for n in plan.nodes]
    return OPEN_S + max(needed, default=0) / PREFAULT_BYTES_S
