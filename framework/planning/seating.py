"""Seating: which node takes which ranks, so that the fewest bytes of state have to move.

Ranks are dealt out in blocks of consecutive ranks, one block a node, because consecutive ranks are tensor-parallel
and data-parallel neighbours. Which node takes which block is the assignment under which the most bytes are in place.

Rule of this file: pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from framework.planning.assignment import assign

EXACT_NODES = 64  # above this many nodes the order of the nodes is kept: pricing all pairs would cost more than it saves


def seat_blocks(
    world: int, nodes: Sequence[tuple[str, int]], overlap: Callable[[str, range], int]
) -> list[tuple[str, int]]:
    """For each rank its (node, slot).

    `nodes`: (name, slots), in order of preference: the first that suffice are used. `overlap(node, ranks)` gives the
    bytes that the node already holds of what these ranks need. Raises ValueError if the slots do not suffice.
    """
    used: list[tuple[str, int]] = []
    for node in nodes:
        if sum(slots for _, slots in used) >= world:
            break
        used.append(node)
    if sum(slots for _, slots in used) < world:
        raise ValueError(f"seats: {world} ranks need as many slots, got {sum(slots for _, slots in used)}")
    order = _arrange(world, sorted(used), overlap) if len(used) <= EXACT_NODES else sorted(used)
    return [(node, slot) for (node, _), ranks in zip(order, _blocks(world, order), strict=True) for slot in _slots(ranks)]


def _slots(ranks: range) -> range:
    return range(len(ranks))


def _blocks(world: int, order: Sequence[tuple[str, int]]) -> list[range]:
    blocks, start = [], 0
    for _, slots in order:
        blocks.append(range(start, min(world, start + slots)))
        start = blocks[-1].stop
    return blocks


def _arrange(
    world: int, nodes: list[tuple[str, int]], overlap: Callable[[str, range], int]
) -> list[tuple[str, int]]:
    """An order of the nodes with much of every block's state already in place."""
    if len({slots for _, slots in nodes}) > 1:
        return nodes  # unequal nodes: a swap would move the bounds of all blocks between them
    blocks = _blocks(world, nodes)
    price = {(node, i): overlap(node, ranks) for node, _ in nodes for i, ranks in enumerate(blocks)}
    node_of_block = assign([[price[node, i] for node, _ in nodes] for i in range(len(blocks))])
    slots = nodes[0][1]
    return [(nodes[index][0], slots) for index in node_of_block]
