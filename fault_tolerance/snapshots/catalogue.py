"""Catalogue: which snapshots exist, by what the surviving vaults hold, and nobody's word besides.

    inventories of the vaults that answer  ->  for every (generation, step): is every stripe of every group decodable?
                                               yes: a Snapshot, with its holders     no: a Rejected, with the reason

A block counts if its vault says that it is complete and has not found it damaged; what is damaged without being known
is found when it is read. Newest step first; of one step, the newest generation.

Rule of this file: pure, exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fault_tolerance.coding.placement import Group, Stripe
from fault_tolerance.digest import MODULUS
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan


@dataclass(frozen=True, slots=True)
class Holder:
    """What one living vault has of a snapshot. `bad` are (kind, index, chunk)."""

    node: str
    address: str
    data: bool
    parity: frozenset[int]
    bad: frozenset[tuple[str, int, int]] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        bad = sorted(map(list, self.bad))
        return {"node": self.node, "address": self.address, "data": self.data, "parity": sorted(self.parity), "bad": bad}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Holder:
        """The inverse."""
        bad = frozenset((str(kind), int(index), int(chunk)) for kind, index, chunk in plain["bad"])
        return Holder(plain["node"], plain["address"], bool(plain["data"]), frozenset(plain["parity"]), bad)


@dataclass(frozen=True)
class Snapshot:
    """A decodable version. `digest` is that of the logical state at capture; `extra` what the lowest rank staged;
    `spare` how many more nodes may be lost, whichever they are; `missing` the nodes whose bytes must be decoded.
    """

    plan: SnapshotPlan
    step: int
    holders: tuple[Holder, ...]
    protected: bool
    digest: int
    extra: Mapping[str, Any]
    spare: int
    missing: tuple[str, ...]
    _by_node: dict[str, Holder] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._by_node.update({holder.node: holder for holder in self.holders})

    @property
    def generation(self) -> int:
        """The generation that made it."""
        return self.plan.generation

    @property
    def key(self) -> tuple[int, int]:
        """(generation, step): what `SnapshotPlan.base` wants."""
        return self.plan.generation, self.step

    def holder(self, node: str) -> Holder | None:
        """What the vault of a node has, None if that node is gone."""
        return self._by_node.get(node)

    def to_json(self) -> dict[str, Any]:
        """Plain data, to send to workers."""
        return {
            "plan": self.plan.to_json(),
            "step": self.step,
            "holders": [holder.to_json() for holder in self.holders],
            "protected": self.protected,
            "digest": f"{self.digest:016x}",
            "extra": dict(self.extra),
            "spare": self.spare,
            "missing": list(self.missing),
        }

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Snapshot:
        """The inverse."""
        return Snapshot(
            plan=SnapshotPlan.from_json(plain["plan"]),
            step=plain["step"],
            holders=tuple(map(Holder.from_json, plain["holders"])),
            protected=plain["protected"],
            digest=int(plain["digest"], 16),
            extra=plain["extra"],
            spare=plain["spare"],
            missing=tuple(plain["missing"]),
        )


@dataclass(frozen=True, slots=True)
class Rejected:
    """A version of which something is left, but not enough."""

    generation: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Newest first."""

    snapshots: tuple[Snapshot, ...]
    rejected: tuple[Rejected, ...]

    @property
    def newest(self) -> Snapshot | None:
        """The one to restore from."""
        return self.snapshots[0] if self.snapshots else None


def catalogue(inventories: Iterable[Mapping[str, Any]], *, run: str) -> Catalogue:
    """Judge everything that the inventories speak of. Inventories of other runs are ignored."""
    inventories = [inventory for inventory in inventories if inventory["run"] == run]
    plans = {name: plan for inventory in inventories for name, plan in inventory["plans"].items()}
    found: dict[tuple[int, int, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for inventory in inventories:
        for version in inventory["versions"]:
            key = (version["step"], version["generation"], version["plan"])
            found.setdefault(key, []).append((inventory, version))
    decoded = {name: SnapshotPlan.from_json(plans[name]) for name in {key[2] for key in found}}
    judged = [_judge(decoded[key[2]], key[0], found[key]) for key in sorted(found, reverse=True)]
    return Catalogue(
        tuple(item for item in judged if isinstance(item, Snapshot)),
        tuple(item for item in judged if isinstance(item, Rejected)),
    )


def _judge(
    plan: SnapshotPlan, step: int, parts: list[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> Snapshot | Rejected:
    holders = tuple(_holder(inventory, version) for inventory, version in parts)
    metas = {node: meta for _, version in parts for node, meta in version["metas"].items()}
    staging = [node for node in plan.members if node not in metas]
    if staging:
        return Rejected(plan.generation, step, f"nodes {', '.join(staging)} had not staged it, as far as is known")
    lacks = list(_lacks(plan, {holder.node: holder for holder in holders}))
    if lacks:
        return Rejected(plan.generation, step, "; ".join(lacks[:3]) + ("; ..." if len(lacks) > 3 else ""))
    by_node = {holder.node: holder for holder in holders}
    extras = {int(rank): extra for meta in metas.values() for rank, extra in meta["extras"].items()}
    return Snapshot(
        plan=plan,
        step=step,
        holders=holders,
        protected=any(version["state"] == "protected" for _, version in parts),
        digest=sum(int(metas[node]["digest"], 16) for node in plan.members) % MODULUS,
        extra=extras[min(extras)] if extras else {},
        spare=min((len(p) - g.k for g in plan.groups for s in g.stripes for p in [present(plan, by_node, g, s)]), default=0),
        missing=tuple(n for n in plan.nodes if plan.node_bytes(n) and not (n in by_node and by_node[n].data)),
    )


def _holder(inventory: Mapping[str, Any], version: Mapping[str, Any]) -> Holder:
    return Holder.from_json({**version, "node": inventory["node"], "address": inventory["address"]})


def present(
    plan: SnapshotPlan, holders: Mapping[str, Holder], group: Group, stripe: Stripe, chunk: int | None = None
) -> list[int]:
    """Positions of a stripe (data 0..k-1, then parity) that can be had: held, or known to be zeros.

    With `chunk`, of that chunk alone, leaving out copies that are known to be damaged.
    """
    found = []
    for position, node in enumerate(stripe.nodes):
        if position < group.k:
            block = group.block_of(node, stripe.index)
            assert block is not None
            kind, index, held = "data", block, node in holders and holders[node].data
            held = held or plan.real_bytes(node, block) <= (chunk or 0) * plan.chunk_bytes
        else:
            kind, index = "parity", position - group.k
            held = node in holders and index in holders[node].parity
        damaged = chunk is not None and node in holders and (kind, index, chunk) in holders[node].bad
        if held and not damaged:
            found.append(position)
    return found


def _lacks(plan: SnapshotPlan, holders: Mapping[str, Holder]) -> Iterator[str]:
    """A sentence for each stripe that cannot be decoded."""
    for group in plan.groups:
        for stripe in group.stripes:
            needed = [p for p in range(group.k) if _real(plan, group, stripe, p)]
            chunks: list[int | None] = [None, *sorted(_bad_chunks(holders, stripe))]
            for chunk in chunks:
                have = present(plan, holders, group, stripe, chunk)
                if len(have) < group.k and not set(needed) <= set(have):
                    lost = [node for position, node in enumerate(stripe.nodes) if position not in have]
                    where = "" if chunk is None else f" chunk {chunk}"
                    count = f"has {len(have)} of the {group.k} blocks it needs"
                    yield f"stripe {stripe.index}{where} of group {group.nodes[0]}.. {count}: none from {', '.join(lost)}"
                    break


def _real(plan: SnapshotPlan, group: Group, stripe: Stripe, position: int) -> int:
    node = stripe.data[position]
    block = group.block_of(node, stripe.index)
    assert block is not None
    return plan.real_bytes(node, block)


def _bad_chunks(holders: Mapping[str, Holder], stripe: Stripe) -> set[int]:
    return {chunk for node in stripe.nodes if node in holders for _, _, chunk in holders[node].bad}
