"""Budget: the memory that snapshots take on each node, known before anything starts.

    arenas     2 versions x the node's own state         one being filled, one protected
    parity     2 versions x m blocks of its group        the same two versions
    transfer   2 x (k + m - 1) chunks                    one stripe is gathered, encoded and passed on at a time,
                                                         double-buffered

With n nodes of D bytes and tolerance m, arenas and parity are 2 D n / (n - m) per node.

Rule of this file: names and integers in, values or a refusal out; nobody is asked how much memory there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fault_tolerance.coding.placement import Group

VERSIONS = 2
CHUNK_BUFFERS = 2
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class NodeBudget:
    """Bytes on one node. `shared_bytes` is what lies in shared memory; the transfer buffers are private."""

    node: str
    arena_bytes: int
    parity_bytes: int
    transfer_bytes: int

    @property
    def shared_bytes(self) -> int:
        """Arenas and parity."""
        return self.arena_bytes + self.parity_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.shared_bytes + self.transfer_bytes

    def __str__(self) -> str:
        return (
            f"{self.node}: {_size(self.total_bytes)} = arenas {_size(self.arena_bytes)} + parity "
            f"{_size(self.parity_bytes)} + transfer {_size(self.transfer_bytes)}"
        )


def budget(groups: Sequence[Group], node_bytes: Mapping[str, int], *, chunk_bytes: int) -> dict[str, NodeBudget]:
    """What each node needs to keep `node_bytes` of its own state, and its share of parity. By node, in group order."""
    if chunk_bytes <= 0:
        raise ValueError(f"budget: chunk_bytes must be > 0, got {chunk_bytes}")
    return {node: _node(group, node, node_bytes, chunk_bytes) for group in groups for node in group.nodes}


def check(
    needs: Mapping[str, NodeBudget],
    rooms: Mapping[str, Mapping[str, int]],
    held: Mapping[str, int] | None = None,
) -> None:
    """Refuse a plan that does not fit, with the numbers of every pool of memory that is short.

    `rooms` has the free bytes of each pool that a node draws from, by node (`room.py`); nodes that name the same pool
    share it. `held` is what a node's vault has of it already, which is used again. A node that `rooms` does not name is
    not checked. Raises ValueError.
    """
    short = list(_short(needs, rooms, held or {}))
    if short:
        raise ValueError(
            "budget: snapshots must fit into the nodes' memory, got "
            + "; ".join(short)
            + "; lower fault_tolerance.tolerate, raise group_size, use more nodes or set every_steps=0"
        )


def _short(
    needs: Mapping[str, NodeBudget], rooms: Mapping[str, Mapping[str, int]], held: Mapping[str, int]
) -> Iterator[str]:
    free: dict[str, int] = {}
    users: dict[str, list[str]] = {}
    for node in needs:
        for pool, left in rooms.get(node, {}).items():
            free[pool] = min(left, free.get(pool, left))
            users.setdefault(pool, []).append(node)
    said: set[tuple[str, ...]] = set()
    for pool, nodes in sorted(users.items(), key=lambda item: free[item[0]]):
        more = sum(max(0, needs[node].total_bytes - held.get(node, 0)) for node in nodes)
        if more > free[pool] and tuple(nodes) not in said:
            said.add(tuple(nodes))
            yield _sentence([needs[node] for node in nodes], more, free[pool], pool)


def _sentence(needs: Sequence[NodeBudget], more: int, free: int, pool: str) -> str:
    held = sum(need.total_bytes for need in needs) - more
    kept = f", of which {_size(held)} are there already" if held else ""
    if len(needs) == 1:
        return f"{needs[0]}{kept}, but only {_size(free)} is free ({pool})"
    names = f"{needs[0].node}..{needs[-1].node}, which share {pool},"
    return f"{names} need {_size(more + held)}{kept}, but only {_size(free)} is free there; {needs[0]}"


def _node(group: Group, node: str, node_bytes: Mapping[str, int], chunk_bytes: int) -> NodeBudget:
    block = group.block_bytes(node_bytes)
    buffers = CHUNK_BUFFERS * (group.k + group.m - 1) if group.m else 0
    return NodeBudget(
        node=node,
        arena_bytes=VERSIONS * _pages(node_bytes[node]),
        parity_bytes=VERSIONS * _pages(group.m * block),
        transfer_bytes=buffers * min(chunk_bytes, block),
    )


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{value:.2f} {unit}"
