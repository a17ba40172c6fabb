"""Ways: from the connections that are stuck to the way, or the machine, that is broken.

    0 -> 3 stuck   1 -> 3 stuck   3 -> 0 stuck    all ways of 3: machine 3 is cut off
    0 -> 2 stuck   2 -> 0 stuck                   one pair: the way between 0 and 2 (a lost direction loses
                                                  the acknowledgements of the other, so both look stuck)

Rule of this file: pure. A pair of ranks is joined by the two ends of their connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fault_tolerance.tcp import Address, Connection
from fault_tolerance.verdict import Kind, Topology, Verdict

Pair = tuple[int, int]


def used_and_stuck(connections: Mapping[int, Sequence[Connection]]) -> tuple[set[Pair], set[Pair]]:
    """(all ways between ranks, those that are stuck) as (from, to), by matching the ends of connections."""
    owner: dict[tuple[Address, Address], int] = {
        (c.local, c.remote): rank for rank, mine in connections.items() for c in mine
    }
    used, stuck = set(), set()
    for rank, mine in connections.items():
        for c in mine:
            other = owner.get((c.remote, c.local))
            if other is not None and other != rank:
                used.add((rank, other))
                if c.stuck:
                    stuck.add((rank, other))
    return used, stuck


def locate(suspicion: Verdict, connections: Mapping[int, Sequence[Connection]], topology: Topology) -> Verdict:
    """The verdict of a transfer that does not end, with its place as the kernels of the machines know it.

    It comes back unchanged where no connection between ranks is stuck.
    """
    used, stuck = used_and_stuck(connections)
    between = {(a, b) for a, b in used if topology.nodes[a] != topology.nodes[b]}
    bad = {frozenset(pair) for pair in stuck}
    if not bad:
        return suspicion
    evidence = (*suspicion.evidence, *(f"rank {a} -> rank {b}: sent again, not acknowledged" for a, b in sorted(stuck)))
    for node in topology.nodes:
        peers = {_other(pair, node, topology) for pair in between} - {None}
        lost = {_other((min(p), max(p)), node, topology) for p in bad} - {None}
        if len(peers) > 1 and 2 * len(lost) > len(peers) and all(node in topology.on(p) for p in bad):
            reason = f"{node} is cut off: nothing between it and {', '.join(sorted(map(str, lost)))} is acknowledged"
            return replace(
                suspicion,
                kind=Kind.NODE_LOSS,
                ranks=topology.ranks_of(node),
                nodes=(node,),
                link=None,
                reason=reason,
                evidence=evidence,
                confidence=0.9,
            )
    a, b = sorted(min(bad, key=sorted))
    reason = f"the way between rank {a} and rank {b} is broken: what they send is not acknowledged"
    return replace(
        suspicion,
        ranks=(a, b),
        nodes=topology.on((a, b)),
        link=(a, b),
        reason=reason,
        evidence=evidence,
        confidence=0.95 if len(bad) == 1 else 0.6,
    )


def _other(pair: Pair, node: str, topology: Topology) -> str | None:
    """The machine at the other end of a way of this machine."""
    ends = topology.nodes[pair[0]], topology.nodes[pair[1]]
    if node not in ends or ends[0] == ends[1]:
        return None
    return ends[1] if ends[0] == node else ends[0]
