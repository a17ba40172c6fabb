"""Memory: the controller's view of the vaults: what they hold, what they are told, what has happened in them.

    look      every vault's inventory -> catalogue -> the newest snapshot that decodes
    open      a plan's groups and addresses -> every vault makes room, older generations are fenced
    poll      snapshots that became protected or were given up, processes that are gone

Nothing here is needed to read a snapshot again: a controller that is started anew looks, and knows.

Rule of this file: it asks and tells vaults; what decodes is judged by `fault_tolerance/catalogue.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fault_tolerance.catalogue import Catalogue, Snapshot, catalogue
from fault_tolerance.placement import plan_groups
from fault_tolerance.snapshot_plan import SnapshotPlan
from fault_tolerance.vault_client import VaultClient
from fault_tolerance.wire import Refused, WireError
from framework.cluster import CallError, Remote
from framework.config import Config
from framework.plan import Plan
from framework.pool import PoolError
from parallel.atlas import Atlas
from parallel.layout import Layout

ASK_S = 5.0


class Memory:
    """The vaults of a run, by node."""

    def __init__(self, config: Config, *, run_id: str, secret: str, atlas: Callable[[Layout, str], Atlas]) -> None:
        self._keeping, self._schedule = config.fault_tolerance, config.layout.schedule
        self._run, self._secret, self._atlas = run_id, bytes.fromhex(secret), atlas
        self._clients: dict[str, VaultClient] = {}
        self._seen: dict[str, int] = {}
        self._catalogue = Catalogue((), ())
        self._rejected: set[tuple[int, int]] = set()
        self._plan: SnapshotPlan | None = None
        self._parts: dict[int, dict[str, Mapping[str, Any]]] = {}
        self.lost: frozenset[str] = frozenset()
        self.generation = 0
        self.protected: int | None = None

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

    def look(self, agents: Mapping[str, Remote]) -> None:
        """Ask all vaults what they hold."""
        self._connect(agents)
        inventories = [answer for answer in self._all(lambda client: client.inventory()).values() if answer is not None]
        self.generation = max([self.generation, *(int(i["generation"]) for i in inventories)])
        self._catalogue = catalogue(inventories, run=self._run)

    def fence(self, generation: int) -> None:
        """Nobody of an older generation may write any more."""
        self._all(lambda client: client.fence(generation))

    def reject_newest(self) -> None:
        """The snapshot that was chosen failed its proof: it is never tried again."""
        if self.snapshot is not None:
            self._rejected.add(self.snapshot.key)

    def overlap(self, layout: Layout, node: str, ranks: range) -> int:
        """Bytes that a node's vault already holds of what these ranks of a layout need."""
        snapshot = self.snapshot
        if snapshot is None or snapshot.holder(node) is None:
            return 0
        old, new = snapshot.plan, self._atlas(layout, self._schedule)
        kept = {e.piece.tensor: [] for r in old.ranks_on(node) for e in old.slab(r).entries}  # type: ignore[var-annotated]
        for rank in old.ranks_on(node):
            for entry in old.slab(rank).entries:
                kept[entry.piece.tensor].append(entry.piece.box)
        total = 0
        for rank in ranks:
            for piece in new.held(rank):
                both = (box.intersect(piece.box) for box in kept.get(piece.tensor, ()))
                total += sum(box.size for box in both if box is not None)
        return 4 * total

    def open(self, plan: Plan, agents: Mapping[str, Remote]) -> dict[str, Any]:
        """Open a plan on the vaults of its nodes. Returns what its workers must be told.

        Raises PoolError if a vault cannot take it up.
        """
        self._connect(agents)
        size = self._keeping.group_size or len(plan.nodes)
        base = self.snapshot.key if self.snapshot is not None and plan.source.tier == "memory" else None
        rate = self._keeping.max_rate_mb_s
        snapshots = SnapshotPlan(
            run=self._run,
            generation=plan.generation,
            atlas=self._atlas(plan.layout, plan.schedule),
            seats=plan.node_of_rank,
            groups=plan_groups(dict(plan.domains), tolerate=plan.tolerate, group_size=max(size, plan.tolerate + 1)),
            addresses={node: self._clients[node].address for node in plan.nodes},
            chunk_bytes=self._keeping.chunk_bytes,
            max_rate_bytes_s=None if rate is None else rate * 1e6,
            scrub_bytes_s=self._keeping.scrub_mb_s * 1e6,
            base=base,
        )
        opened = self._all(lambda client: client.open(snapshots), only=plan.nodes)
        missing = sorted(set(plan.nodes) - {node for node, answer in opened.items() if answer is not None})
        if missing:
            raise PoolError(f"vaults of {', '.join(missing)} did not take up generation {plan.generation}")
        self._plan, self._parts, self.lost, self.protected = snapshots, {}, frozenset(), None
        restore = self.snapshot.to_json() if base is not None and self.snapshot is not None else None
        return {"snapshots": snapshots.to_json(), "restore": restore}

    def poll(self) -> Iterator[dict[str, Any]]:
        """The snapshots that have come to an end since the last time, as events; notes vaults that are gone."""
        plan = self._plan
        if plan is None:
            return
        lost = set(self.lost)
        for node in plan.nodes:
            client = self._clients.get(node)
            try:
                events = client.watch(self._seen.get(node, 0)) if client is not None else []
            except (WireError, Refused):
                lost.add(node)
                continue
            for event in events:
                self._seen[node] = int(event["number"])
                yield from self._heard(plan, node, event)
        self.lost = frozenset(lost)

    def tolerance(self) -> int:
        """How many more nodes may be lost now, whichever they are, and the state still be decoded."""
        if self._plan is None or self.protected is None:
            return 0
        return min(group.m for group in self._plan.groups)

    def forget(self, node: str) -> None:
        """A node is gone."""
        client = self._clients.pop(node, None)
        if client is not None:
            client.close()

    def _heard(self, plan: SnapshotPlan, node: str, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if event["kind"] != "snapshot" or event.get("generation") != plan.generation:
            return
        step = int(event["step"])
        parts = self._parts.setdefault(step, {})
        parts[node] = event
        if len(parts) < len(plan.nodes):
            return
        del self._parts[step]
        protected = all(part["state"] == "protected" for part in parts.values())
        if protected:
            self.protected = max(step, self.protected or 0)
        yield {
            "step": step,
            "reason": "protected" if protected else next(str(p["reason"]) for p in parts.values() if p["state"] != "protected"),
            "protected": protected,
            "bytes": sum(int(part["bytes"]) for part in parts.values()),
            "wire_bytes": sum(int(part["wire_bytes"]) for part in parts.values()),
            **{
                name: max(float(part.get(name, 0.0)) for part in parts.values())
                for name in ("copy_s", "stage_s", "encode_s", "total_s")
            },
            "tolerance": self.tolerance(),
        }

    def _connect(self, agents: Mapping[str, Remote]) -> None:
        for node in set(self._clients) - set(agents):
            self.forget(node)
        calls = {node: agent.call("address") for node, agent in agents.items() if node not in self._clients}
        for node, call in calls.items():
            try:
                address = call.result(ASK_S)
            except (CallError, TimeoutError):
                continue  # it is still starting, or gone: the pool knows
            self._clients[node] = VaultClient(address, run=self._run, secret=self._secret, timeout_s=ASK_S)
            self._seen[node] = 0

    def _all(
        self, ask: Callable[[VaultClient], Any], *, only: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Ask many vaults at once. None stands for one that does not answer."""
        clients = {n: c for n, c in self._clients.items() if only is None or n in only}
        if not clients:
            return {}
        with ThreadPoolExecutor(min(64, len(clients))) as pool:
            return dict(zip(clients, pool.map(lambda client: _answer(ask, client), clients.values()), strict=True))


def _answer(ask: Callable[[VaultClient], Any], client: VaultClient) -> Any:
    try:
        return ask(client) or {}
    except (WireError, Refused):
        return None
