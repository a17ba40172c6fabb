"""Overlap: which bytes of a snapshot lie on a node already, for ranks of any layout. It prices seats, and so restores.

    old atlas + old seats -> what a node's vault holds         n1: boxes a b c
    new atlas             -> what some ranks need              ranks 2, 3: boxes b c d    -> b and c need not move

Rule of this file: pure, exact. It counts bytes and moves none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.snapshots.slab import item_bytes
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from parallel.atlas import Atlas
from parallel.boxes import Box
from parallel.layout import Layout

Boxes = NDArray[np.int64]


class Overlap:
    """Bytes of one snapshot by node. `holders` are the nodes whose vaults still hold their own bytes of it."""

    def __init__(self, plan: SnapshotPlan, holders: Collection[str], atlas: Callable[[Layout], Atlas]) -> None:
        self._plan, self._nodes, self._atlas = plan, sorted(holders), atlas
        self._tables: dict[Layout, dict[str, NDArray[np.int64]]] = {}
        self._needed: dict[Layout, int] = {}

    def __call__(self, layout: Layout, node: str, ranks: range) -> int:
        """Bytes that these ranks of a layout need and that are on the node."""
        table = self._table(layout).get(node)
        return 0 if table is None else int(table[ranks.start : ranks.stop].sum())

    def needed(self, layout: Layout) -> int:
        """Bytes that all ranks of a layout need, wherever they come from."""
        self._table(layout)
        return self._needed[layout]

    @cached_property
    def _kept(self) -> dict[str, tuple[Boxes, NDArray[np.int64]]]:
        """tensor: the boxes that nodes have of it, and the numbers of these nodes."""
        found: dict[str, list[tuple[Box, int]]] = {}
        for number, node in enumerate(self._nodes):
            for rank in self._plan.ranks_on(node):
                for entry in self._plan.slab(rank).entries:
                    found.setdefault(entry.piece.tensor, []).append((entry.piece.box, number))
        return {tensor: _arrays(items) for tensor, items in found.items()}

    def _table(self, layout: Layout) -> dict[str, NDArray[np.int64]]:
        """node: for each rank of a layout the bytes that it needs and the node has."""
        if layout not in self._tables:
            atlas, wanted, needed = self._atlas(layout), dict[str, list[tuple[Box, int]]](), 0
            for rank in range(layout.world):
                for piece in atlas.held(rank):
                    wanted.setdefault(piece.tensor, []).append((piece.box, rank))
                    needed += piece.box.size * item_bytes(atlas.by_name[piece.tensor].dtype)
            total = np.zeros((len(self._nodes), layout.world), np.int64)
            for tensor, items in wanted.items():
                if tensor in self._kept:
                    (kept, nodes), (need, ranks) = self._kept[tensor], _arrays(items)
                    width = item_bytes(atlas.by_name[tensor].dtype)
                    np.add.at(total, (nodes[:, None], ranks[None, :]), width * _common(kept, need))
            self._tables[layout], self._needed[layout] = dict(zip(self._nodes, total, strict=True)), needed
        return self._tables[layout]


def _arrays(items: list[tuple[Box, int]]) -> tuple[Boxes, NDArray[np.int64]]:
    """Boxes as [box, start or stop, dim], and what stands beside them."""
    return np.array([(box.start, box.stop) for box, _ in items], np.int64), np.array([number for _, number in items], np.int64)


def _common(a: Boxes, b: Boxes) -> NDArray[np.int64]:
    """Elements that each box of `a` has in common with each of `b`."""
    start, stop = np.maximum(a[:, None, 0], b[None, :, 0]), np.minimum(a[:, None, 1], b[None, :, 1])
    common: NDArray[np.int64] = np.clip(stop - start, 0, None).prod(axis=-1)
    return common
