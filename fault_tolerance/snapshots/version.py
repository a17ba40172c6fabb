"""Version: what one vault holds of the snapshot of one step.

    staging ----> staged ----> coded ----> protected            on one vault; a snapshot is as good as its blocks
       |  all local  | hashes,    | this vault's   | every vault of the plan is coded:
       |  ranks      | told to    | stripes are    | older versions may go
       |  copied     | the group  | encoded        |
       +-------------+------------+--> abandoned: too slow, or damaged; its memory is used by the next one

    held:  data    the node's own bytes, k blocks            `NodeMeta`: their hashes, known to the whole group
           parity  one block for each number 0 .. m-1        hashes kept here

Rule of this file: state and its bytes; no threads, no sockets. Whoever changes a version holds the vault's lock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.coding.codec import crc32c
from fault_tolerance.digest import combine, digest
from fault_tolerance.snapshots.arena import Segment
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan

Bytes: TypeAlias = NDArray[np.uint8]
Hashes: TypeAlias = NDArray[np.uint32]
Key: TypeAlias = tuple[int, int]
"""(generation, step)."""


class State(StrEnum):
    """How far a version has come on this vault."""

    STAGING = "staging"
    STAGED = "staged"
    CODED = "coded"
    PROTECTED = "protected"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class NodeMeta:
    """What a group must know of a node's data, so that any of its members can speak for it.

    `hashes` has the CRC-32C of each chunk of each of the k blocks; `digest` is the node's share in the digest of the
    logical state; `extras` is what its ranks staged besides tensors.
    """

    node: str
    hashes: tuple[Hashes, ...]
    digest: int
    extras: Mapping[str, Any]

    def to_wire(self) -> tuple[dict[str, Any], memoryview]:
        """A header and a payload."""
        header = {
            "node": self.node,
            "digest": f"{self.digest:016x}",
            "extras": dict(self.extras),
            "counts": [len(hashes) for hashes in self.hashes],
        }
        payload = np.concatenate([*self.hashes, np.empty(0, np.uint32)])
        return header, hash_bytes(payload)

    @staticmethod
    def from_wire(header: Mapping[str, Any], payload: bytes | bytearray) -> NodeMeta:
        """The inverse. Raises ValueError if the payload does not fit the header."""
        flat, counts = np.frombuffer(payload, "<u4"), [int(c) for c in header["counts"]]
        if sum(counts) != len(flat) or min(counts, default=0) < 0:
            raise ValueError(f"NodeMeta: {sum(counts)} hashes must come, got {len(flat)}")
        parts = np.split(flat, np.cumsum(counts)[:-1])
        return NodeMeta(str(header["node"]), tuple(parts), int(header["digest"], 16), dict(header["extras"]))


@dataclass(eq=False)
class Version:
    """The blocks of one step on one node. `bad` are chunks whose hash failed: (kind, index, chunk)."""

    plan: SnapshotPlan
    step: int
    node: str
    state: State = State.STAGING
    data: Segment | None = None
    parity: Segment | None = None
    staged: dict[int, dict[str, Any]] = field(default_factory=dict)
    metas: dict[str, NodeMeta] = field(default_factory=dict)
    parity_hashes: dict[int, Hashes] = field(default_factory=dict)
    parity_whole: set[int] = field(default_factory=set)
    coded_nodes: set[str] = field(default_factory=set)
    bad: set[tuple[str, int, int]] = field(default_factory=set)
    dropped: bool = False
    reason: str = ""
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    wire_mark: int = 0
    wire_bytes: int = 0

    @property
    def key(self) -> Key:
        """(generation, step)."""
        return self.plan.generation, self.step

    @property
    def pending(self) -> bool:
        """Whether it is still on its way to protection."""
        return not self.dropped and self.state in (State.STAGING, State.STAGED, State.CODED)

    @property
    def has_data(self) -> bool:
        """Whether the node's own bytes are complete and hashed."""
        return self.node in self.metas

    @property
    def all_staged(self) -> bool:
        """Whether every local rank has copied its slab."""
        return len(self.staged) == len(self.plan.ranks_on(self.node))

    def real_bytes(self, kind: str, index: int) -> int:
        """Bytes kept of a block. Raises KeyError if this vault has no such block."""
        if kind == "data" and 0 <= index < self.plan.group_of(self.node).k:
            return self.plan.real_bytes(self.node, index)
        if kind == "parity" and 0 <= index < self.plan.group_of(self.node).m:
            return self.plan.block_bytes(self.node)
        raise KeyError(f"{kind} block {index}")

    def block(self, kind: str, index: int) -> Bytes:
        """The bytes kept of a block, live. Raises KeyError if this vault has no such block."""
        length, start = self.real_bytes(kind, index), index * self.plan.block_bytes(self.node)
        segment = self.data if kind == "data" else self.parity
        if segment is None:
            raise KeyError(f"{kind} block {index}")
        return segment.view[start : start + length]

    def hashes(self, kind: str, index: int) -> Hashes:
        """The hashes of a block that is complete. Raises KeyError if it is not."""
        if kind == "data":
            return self.metas[self.node].hashes[index]
        if index not in self.parity_whole:
            raise KeyError(f"parity block {index}")
        return self.parity_hashes[index]

    def blocks(self) -> list[tuple[str, int]]:
        """(kind, index) of every complete block."""
        data = range(self.plan.group_of(self.node).k) if self.has_data else range(0)
        return [("data", b) for b in data] + [("parity", n) for n in sorted(self.parity_whole)]

    def check(self, kind: str, index: int, chunk: int) -> bool:
        """Whether a held chunk still has its hash; if not, it is marked bad."""
        size = self.plan.chunk_bytes
        part = self.block(kind, index)[chunk * size : (chunk + 1) * size]
        good = crc32c(part) == int(self.hashes(kind, index)[chunk])
        if not good:
            self.bad.add((kind, index, chunk))
        return good

    def intact(self, kind: str, index: int) -> bool:
        """Whether a whole held block still has its hashes."""
        return all(self.check(kind, index, chunk) for chunk in range(len(self.hashes(kind, index))))

    def describe(self) -> dict[str, Any]:
        """What the catalogue asks for."""
        return {
            "generation": self.plan.generation,
            "step": self.step,
            "plan": self.plan.fingerprint,
            "state": str(self.state),
            "data": self.has_data,
            "parity": sorted(self.parity_whole),
            "bad": sorted(map(list, self.bad)),
            "metas": {n: {"digest": f"{m.digest:016x}", "extras": dict(m.extras)} for n, m in self.metas.items()},
            "reason": self.reason,
        }

    def timing(self) -> dict[str, Any]:
        """What an event on this snapshot says."""
        copies = [float(item.get("copy_s", 0.0)) for item in self.staged.values()]
        return {
            "step": self.step,
            "generation": self.plan.generation,
            "state": str(self.state),
            "bytes": self.plan.node_bytes(self.node),
            "copy_s": max(copies, default=0.0),
            "wire_bytes": self.wire_bytes,
            "reason": self.reason,
            **{f"{name}_s": seconds for name, seconds in self.seconds.items()},
        }


def hash_bytes(hashes: Hashes) -> memoryview:
    """Hashes as they go over the wire: little-endian."""
    return hashes.astype("<u4").view(np.uint8).data


def hash_chunks(block: Bytes, chunk_bytes: int) -> Hashes:
    """CRC-32C of each chunk of a block."""
    starts = range(0, len(block), chunk_bytes)
    return np.array([crc32c(block[s : s + chunk_bytes]) for s in starts], np.uint32)


def make_meta(version: Version, extras: Mapping[str, Any]) -> NodeMeta:
    """Hash and digest the node's staged bytes. Takes about a nanosecond per element; releases the GIL."""
    plan, node = version.plan, version.node
    blocks = range(plan.group_of(node).k)
    empty = np.empty(0, np.uint8)
    if version.data is None:
        return NodeMeta(node, tuple(empty.view(np.uint32) for _ in blocks), 0, dict(extras))
    hashes = tuple(hash_chunks(version.block("data", b), plan.chunk_bytes) for b in blocks)
    return NodeMeta(node, hashes, node_digest(plan, node, version.data.view), dict(extras))


def node_digest(plan: SnapshotPlan, node: str, view: Bytes) -> int:
    """The share of a node's bytes in the digest of the logical state."""
    total = 0
    for rank in plan.ranks_on(node):
        base = plan.base_of(rank)
        for entry in plan.slab(rank).entries:
            start = base + entry.offset
            width = entry.nbytes // entry.piece.box.size
            array = view[start : start + entry.nbytes].view(f"u{width}").reshape(entry.piece.box.shape)
            total = combine(total, digest(array, name=entry.piece.tensor, box=entry.piece.box))
    return total
