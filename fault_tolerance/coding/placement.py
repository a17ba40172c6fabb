"""Placement: which nodes protect each other, and which node holds what of every stripe.

    a group of n = 5 nodes, m = 2:  P = parity (the first one encodes), 0..k-1 = index of the data block in the stripe

                node a   b   c   d   e        k = n - m = 3 data blocks per stripe
    stripe 0         P   P   0   1   2        block j of a node always has index j in its stripe,
    stripe 1         2   P   P   0   1        so each node's k blocks lie in k different stripes,
    stripe 2         1   2   P   P   0        each node is data in k stripes and parity in m,
    stripe 3         0   1   2   P   P        and first parity, the one that gathers, in one
    stripe 4         P   0   1   2   P

Every stripe has one block on every node of its group, and any k of its n blocks give the others (`codec.py`). So a
group survives a set of losses exactly if at most m of its nodes are in it.

Groups follow failure domains: nodes are dealt out domain by domain, so that two nodes of a domain share a group only
if the domain has more nodes than there are groups; then `limits` says what that costs.

Rule of this file: names and integers. No bytes, no processes.
Source: rotated parity as in RAID-5 (Patterson et al., SIGMOD 1988) and REFT's RAIM5 (arXiv 2310.12670), but m of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

BLOCK_ALIGNMENT = 64
MAX_GROUP = 255


@dataclass(frozen=True, slots=True)
class Stripe:
    """Blocks coded together: `data` nodes in block order, then `parity` nodes; the first parity node encodes."""

    index: int
    data: tuple[str, ...]
    parity: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Position i holds block i of the stripe, as `Codec` counts: data first, then parity."""
        return self.data + self.parity


@dataclass(frozen=True)
class Group:
    """Nodes that protect each other against the loss of any `m` of them."""

    nodes: tuple[str, ...]
    m: int

    def __post_init__(self) -> None:
        if not 0 <= self.m < len(self.nodes) <= MAX_GROUP or len(set(self.nodes)) < len(self.nodes):
            raise ValueError(
                f"Group: 0 <= m < distinct nodes <= {MAX_GROUP} must hold, got m={self.m} and nodes {self.nodes}"
            )

    @property
    def k(self) -> int:
        """Data blocks per stripe, and per node."""
        return len(self.nodes) - self.m

    @cached_property
    def stripes(self) -> tuple[Stripe, ...]:
        """As many as nodes."""
        twice = self.nodes * 2
        return tuple(
            Stripe(index=s, parity=twice[s : s + self.m], data=twice[s + self.m : s + len(self.nodes)])
            for s in range(len(self.nodes))
        )

    def block_of(self, node: str, stripe: int) -> int | None:
        """Which of the node's k data blocks goes into this stripe, and its index there; None where it is parity.

        Raises ValueError if the node is not of this group.
        """
        block = (self._seat(node) - stripe - self.m) % len(self.nodes)
        return block if block < self.k else None

    def stripe_of(self, node: str, block: int) -> int:
        """The stripe of a node's data block; the inverse of `block_of`. Raises ValueError if there is no such one."""
        if not 0 <= block < self.k:
            raise ValueError(f"stripe_of: a node's block must be in 0..{self.k - 1}, got {block}")
        return (self._seat(node) - self.m - block) % len(self.nodes)

    def parities_of(self, node: str) -> tuple[tuple[int, int], ...]:
        """(stripe, parity number) of every parity block the node holds; number 0 where it is the one that encodes."""
        seat = self._seat(node)
        return tuple(((seat - number) % len(self.nodes), number) for number in range(self.m))

    def block_bytes(self, node_bytes: Mapping[str, int]) -> int:
        """Length of every block: the largest node's k-th part, rounded up to 64; smaller nodes pad with zeros."""
        largest = max(node_bytes[node] for node in self.nodes)
        return -(-largest // (self.k * BLOCK_ALIGNMENT)) * BLOCK_ALIGNMENT

    def wire_bytes(self, block_bytes: int) -> int:
        """Bytes that cross the network to protect one snapshot: k gathered and m - 1 passed on, per stripe."""
        return len(self.nodes) * (len(self.nodes) - 1) * block_bytes if self.m else 0

    def _seat(self, node: str) -> int:
        if node not in self._seats:
            raise ValueError(f"Group: the node must be one of {self.nodes}, got {node!r}")
        return self._seats[node]

    @cached_property
    def _seats(self) -> dict[str, int]:
        return {node: seat for seat, node in enumerate(self.nodes)}


def plan_groups(nodes: Mapping[str, str | None], *, tolerate: int, group_size: int) -> tuple[Group, ...]:
    """Groups of at most `group_size` nodes, sizes differing by one at most, each surviving `tolerate` losses.

    `nodes` maps a node to its failure domain; None is a domain of its own. Groups get smaller than `group_size` where
    that keeps a domain's nodes apart, and larger where the numbers leave a group with no more than `tolerate` nodes.
    Depends on the names only, not on their order. Raises ValueError if `tolerate` nodes could be all there are.
    """
    _check(len(nodes), tolerate, group_size)
    count = num_groups(nodes, tolerate=tolerate, group_size=group_size)
    sizes = _domain_sizes(nodes)
    dealt = sorted(nodes, key=lambda node: (-sizes[_domain(nodes, node)], _domain(nodes, node), node))
    return tuple(Group(nodes=tuple(dealt[first::count]), m=tolerate) for first in range(count))


def num_groups(nodes: Mapping[str, str | None], *, tolerate: int, group_size: int) -> int:
    """Enough groups for `group_size` and to spread each domain: one node per group, else `tolerate` per group."""
    least, most = -(-len(nodes) // group_size), len(nodes) // (tolerate + 1)
    if tolerate == 0:
        return least
    largest = max(_domain_sizes(nodes).values())
    for wanted in (largest, -(-largest // tolerate)):
        if max(least, wanted) <= most:
            return max(least, wanted)
    return min(least, most)


def survives(groups: Collection[Group], lost: Collection[str]) -> bool:
    """Whether all data can still be had when the `lost` nodes' memory is gone. Exact."""
    return all(left >= 0 for _, left in _margins(groups, lost))


def tolerance(
    groups: Collection[Group], lost: Collection[str] = (), domains: Mapping[str, str | None] | None = None
) -> int:
    """How many more nodes may die now, whichever they are; with `domains`, how many more whole domains.

    -1 if data is lost already. Exact: the worst case takes the domains with the most members in one group.
    """
    return min((_more(group, left, set(lost), domains) for group, left in _margins(groups, lost)), default=0)


def survives_domain(
    groups: Collection[Group], domain: str, domains: Mapping[str, str | None], lost: Collection[str] = ()
) -> bool:
    """Whether all data can still be had when every node of `domain` dies, besides the `lost` ones."""
    return survives(groups, {*lost, *(node for node, where in domains.items() if where == domain)})


def limits(groups: Sequence[Group], domains: Mapping[str, str | None]) -> tuple[str, ...]:
    """What this placement cannot survive, in plain sentences; empty where every single domain and m nodes may die."""
    return tuple(_limits(groups, domains))


def describe(groups: Sequence[Group], domains: Mapping[str, str | None]) -> str:
    """One line on the groups and what they survive, for the plan's reason."""
    shapes = Counter((len(group.nodes), group.k, group.m) for group in groups)
    parts = [f"{count} x {n} nodes (k={k}, m={m})" for (n, k, m), count in sorted(shapes.items(), reverse=True)]
    survived = f"any {tolerance(groups)} node losses are survived from memory"
    return "; ".join(["groups: " + ", ".join(parts), survived, *limits(groups, domains)])


def _limits(groups: Sequence[Group], domains: Mapping[str, str | None]) -> Iterator[str]:
    if sum(len(group.nodes) for group in groups) == 1:
        yield "a single node: its memory survives a crash of a worker, but nothing survives the loss of the node"
        return
    if any(group.m == 0 for group in groups):
        yield "no parity (tolerate=0): local copies survive a crash of a worker, but not the loss of any node"
        return
    names = sorted({where for where in domains.values() if where is not None})
    members: dict[str, set[str]] = {name: set() for name in names}
    for node, where in domains.items():
        if where is not None:
            members[where].add(node)
    for name in names:
        worst, shared = max(
            ((group, len(members[name].intersection(group.nodes))) for group in groups), key=lambda pair: pair[1]
        )
        if shared > worst.m:
            together = f"{shared} of its nodes share a group that tolerates {worst.m}"
            yield f"losing domain {name!r} is not survived: {together}"
        elif shared > 1:
            yield f"domain {name!r} has {shared} nodes in one group: its loss uses up {shared} of {worst.m} tolerated"


def _more(group: Group, left: int, lost: set[str], domains: Mapping[str, str | None] | None) -> int:
    """How many more nodes (or domains) this group stands, with `left` node losses to go."""
    if left < 0 or domains is None:
        return max(left, -1)
    alive = Counter(_domain(domains, node) for node in group.nodes if node not in lost)
    more = 0
    for _, size in alive.most_common():
        left -= size
        if left < 0:
            break
        more += 1
    return more


def _margins(groups: Collection[Group], lost: Collection[str]) -> Iterator[tuple[Group, int]]:
    gone = set(lost)
    return ((group, group.m - sum(node in gone for node in group.nodes)) for group in groups)


def _domain(domains: Mapping[str, str | None], node: str) -> tuple[bool, str]:
    """The node's failure domain; a node without one is its own, and never equal to a named one."""
    where = domains.get(node)
    return (where is not None, where if where is not None else node)


def _domain_sizes(nodes: Mapping[str, str | None]) -> Counter[tuple[bool, str]]:
    return Counter(_domain(nodes, node) for node in nodes)


def _check(num_nodes: int, tolerate: int, group_size: int) -> None:
    if tolerate < 0:
        raise ValueError(f"plan_groups: tolerate must be >= 0, got {tolerate}")
    if num_nodes <= tolerate:
        raise ValueError(
            f"plan_groups: there must be more nodes than tolerate, got {num_nodes} and tolerate={tolerate}; "
            f"add nodes or set tolerate={max(num_nodes - 1, 0)}" + (_ALONE if num_nodes == 1 else "")
        )
    if not tolerate < group_size <= MAX_GROUP:
        raise ValueError(
            f"plan_groups: group_size must be above tolerate ({tolerate}) and at most {MAX_GROUP}, got {group_size}; "
            f"set it to {min(MAX_GROUP, math.ceil(tolerate * 2) or 1)} or so"
        )


_ALONE = " (a single node cannot survive its own loss: only durable checkpoints do)"
