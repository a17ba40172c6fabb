"""SnapshotPlan: everything about the snapshots of one generation, known before the first byte moves.

    node b's bytes        | slab of rank 2 | slab of rank 3 |          ranks ascending
    cut into k blocks     | block 0   | block 1   | block 2 ~~~|       ~~~ zeros: known, neither kept nor sent
    cut into chunks       |c0 |c1 |c2 |c0 |c1 |c2 |c0 |c1 |            a hash each; what is fetched, checked, decoded

Every vault keeps the plan with each version that was made under it. So whoever has the plan knows where each byte of
each node was, and which stripes and parities it is in, also of a node that is gone.

Rule of this file: pure values, in and out of JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fault_tolerance.coding.placement import Group
from fault_tolerance.snapshots.slab import Slab, slab_of
from parallel.atlas import Atlas, TensorSpec
from parallel.layout import Layout

CHUNK_BYTES = 256 << 10
LEAST_DEADLINE_S = 120.0
SLOWEST_BYTES_S = 20e6  # a node that moves less than this, though nothing limits it, is not working


@dataclass(frozen=True)
class SnapshotPlan:
    """What vaults, workers and restorers of one generation agree on.

    `seats` is the node of each rank; `addresses` where each node's vault listens; `base` the (generation, step) that
    this generation starts from and that vaults keep until it has a protected version of its own (None: nothing). The
    rate limit is per node, on snapshot traffic. A version that is not protected after `deadline_s` is given up.
    """

    run: str
    generation: int
    atlas: Atlas
    seats: tuple[str, ...]
    groups: tuple[Group, ...]
    addresses: Mapping[str, str]
    chunk_bytes: int = CHUNK_BYTES
    max_rate_bytes_s: float | None = None
    scrub_bytes_s: float = 0.0
    deadline_s: float = 120.0
    base: tuple[int, int] | None = None
    _slabs: dict[int, Slab] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.seats) != self.atlas.layout.world:
            raise ValueError(f"snapshot plan: seats must be {self.atlas.layout.world} nodes, got {len(self.seats)}")
        if missing := sorted(set(self.seats) - set(self.nodes)):
            raise ValueError(f"snapshot plan: every node must be in a coding group, got none for {missing}")
        if missing := sorted(set(self.nodes) - set(self.addresses)):
            raise ValueError(f"snapshot plan: every node needs a vault's address, got none for {missing}")
        if self.chunk_bytes < 64 or self.chunk_bytes % 64:
            raise ValueError(f"snapshot plan: chunk_bytes must be a multiple of 64, got {self.chunk_bytes}")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, group by group."""
        return tuple(node for group in self.groups for node in group.nodes)

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The nodes that keep anything: those of a group without a single byte have no part in a snapshot."""
        return tuple(node for node in self.nodes if self.block_bytes(node))

    @property
    def coordinator(self) -> str:
        """The node whose vault learns that all is in place, and says so to the others."""
        return self.members[0]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal plans; part of the identity of every block."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def _group(self) -> dict[str, Group]:
        return {node: group for group in self.groups for node in group.nodes}

    @cached_property
    def _block(self) -> dict[str, int]:
        sizes = {node: self.node_bytes(node) for node in self.nodes}
        return {node: group.block_bytes(sizes) for group in self.groups for node in group.nodes}

    @cached_property
    def _ranks(self) -> dict[str, tuple[int, ...]]:
        return {node: tuple(r for r, seat in enumerate(self.seats) if seat == node) for node in self.nodes}

    def group_of(self, node: str) -> Group:
        """The coding group of a node."""
        return self._group[node]

    def ranks_on(self, node: str) -> tuple[int, ...]:
        """The ranks that sit on a node, ascending."""
        return self._ranks.get(node, ())

    def slab(self, rank: int) -> Slab:
        """What a rank stages."""
        if rank not in self._slabs:
            self._slabs[rank] = slab_of(self.atlas, rank)
        return self._slabs[rank]

    def base_of(self, rank: int) -> int:
        """Where a rank's slab begins in its node's bytes."""
        return sum(self.slab(r).nbytes for r in self.ranks_on(self.seats[rank]) if r < rank)

    def node_bytes(self, node: str) -> int:
        """Bytes that a node stages."""
        return sum(self.slab(rank).nbytes for rank in self.ranks_on(node))

    def block_bytes(self, node: str) -> int:
        """Length of every block in the node's group, with the zeros at the end of a short one."""
        return self._block[node]

    def real_bytes(self, node: str, block: int) -> int:
        """Bytes of a node's block that are not known to be zero."""
        length = self._block[node]
        return min(length, max(0, self.node_bytes(node) - block * length))

    def num_chunks(self, nbytes: int) -> int:
        """Chunks in so many bytes of a block."""
        return -(-nbytes // self.chunk_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        specs = [[s.name, list(s.shape), s.dtype, s.tp_dim, list(s.units), s.frozen] for s in self.atlas.specs]
        return {
            "run": self.run,
            "generation": self.generation,
            "specs": specs,
            "layout": str(self.atlas.layout),
            "schedule": self.atlas.schedule,
            "num_layers": self.atlas.num_layers,
            "sharding": self.atlas.sharding,
            "seats": list(self.seats),
            "groups": [{"nodes": list(group.nodes), "m": group.m} for group in self.groups],
            "addresses": dict(self.addresses),
            "chunk_bytes": self.chunk_bytes,
            "max_rate_bytes_s": self.max_rate_bytes_s,
            "scrub_bytes_s": self.scrub_bytes_s,
            "deadline_s": self.deadline_s,
            "base": None if self.base is None else list(self.base),
        }

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> SnapshotPlan:
        """The inverse of `to_json`. Raises ValueError if it is not one."""
        try:
            return _decode(plain)
        except (KeyError, TypeError) as error:
            raise ValueError(f"snapshot plan: must be what `to_json` gives, got {error!r}") from error


def deadline_s(plan: SnapshotPlan) -> float:
    """How long a version may take before it is given up: three times what its bytes need at the rate that is allowed."""
    slowest = 0.0
    for node in plan.nodes:
        group = plan.group_of(node)
        slowest = max(slowest, group.wire_bytes(plan.block_bytes(node)) / len(group.nodes), plan.node_bytes(node))
    return max(LEAST_DEADLINE_S, 3 * slowest / min(plan.max_rate_bytes_s or SLOWEST_BYTES_S, SLOWEST_BYTES_S))


def _decode(plain: Mapping[str, Any]) -> SnapshotPlan:
    specs = tuple(TensorSpec(n, tuple(shape), dtype, tp, tuple(u), frozen) for n, shape, dtype, tp, u, frozen in plain["specs"])
    layout = Layout.parse(plain["layout"])
    base = plain["base"]
    return SnapshotPlan(
        run=plain["run"],
        generation=plain["generation"],
        atlas=Atlas(specs, layout, plain["schedule"], plain["num_layers"], plain["sharding"]),
        seats=tuple(plain["seats"]),
        groups=tuple(Group(tuple(group["nodes"]), group["m"]) for group in plain["groups"]),
        addresses=dict(plain["addresses"]),
        chunk_bytes=plain["chunk_bytes"],
        max_rate_bytes_s=plain["max_rate_bytes_s"],
        scrub_bytes_s=plain["scrub_bytes_s"],
        deadline_s=plain["deadline_s"],
        base=None if base is None else (base[0], base[1]),
    )
