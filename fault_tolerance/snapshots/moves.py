"""Moves: which bytes of a snapshot go where in a new layout. Old atlas ∩ new atlas.

    old rank 2 owned   +-----------+        new rank 0 holds  +-----+
                       |     ######|########                  |#####|        one Move: the overlap, with its place
                       +-----######+       #                  +-----+        in the old node's bytes and in the
                             #              #                                new rank's tensor
                             +--------------+

Moves are put into batches of one node each, ascending, so that a chunk that many small tensors share is fetched once,
and scratch memory stays small however large the state is.

Rule of this file: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fault_tolerance.snapshots.slab import Entry, item_bytes
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from parallel.atlas import Atlas, Piece
from parallel.boxes import Box

MOVE_BYTES = 16 << 20
BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Move:
    """`overlap` of a tensor: from the piece at byte `start` of `node`, whose box was `source`, into `target`.

    The bytes are all within [first, last) of the node's bytes.
    """

    tensor: str
    dtype: str
    node: str
    start: int
    source: Box
    target: Box
    overlap: Box
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes that the new rank takes."""
        return self.overlap.size * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Batch:
    """Moves out of one node, and the ranges of its bytes, whole chunks, that they need."""

    node: str
    ranges: tuple[tuple[int, int], ...]
    moves: tuple[Move, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to be fetched."""
        return sum(last - first for first, last in self.ranges)


def moves_for(plan: SnapshotPlan, atlas: Atlas, rank: int) -> list[Move]:
    """Every move that fills what a rank holds, by node and place. Raises ValueError if the model is another one."""
    _check(plan.atlas, atlas)
    wanted = atlas.held(rank)
    entries: dict[str, list[tuple[str, int, Entry]]] = {}
    names = {piece.tensor for piece in wanted}
    for rank, node in enumerate(plan.seats):
        base = plan.base_of(rank)
        for entry in plan.slab(rank).entries:
            if entry.piece.tensor in names:
                entries.setdefault(entry.piece.tensor, []).append((node, base, entry))
    moves = [move for piece in wanted for move in _moves(piece, entries.get(piece.tensor, []))]
    assert sum(move.overlap.size for move in moves) == sum(piece.box.size for piece in wanted), "the slabs tile the state"
    return sorted(moves, key=lambda move: (move.node, move.first, move.last))


def batches(plan: SnapshotPlan, moves: Iterable[Move]) -> list[Batch]:
    """The moves in batches of about BATCH_BYTES of chunks each."""
    found: list[Batch] = []
    pending: list[Move] = []
    size, node, reach = 0, "", 0
    for move in moves:
        first, last = widen(plan, move.node, move.first, move.last)
        if move.node != node or size > BATCH_BYTES:
            found += _batch(plan, pending)
            pending, size, node, reach = [], 0, move.node, first
        pending.append(move)
        size += max(0, last - max(first, reach))
        reach = max(reach, last)
    return found + _batch(plan, pending)


def widen(plan: SnapshotPlan, node: str, first: int, last: int) -> tuple[int, int]:
    """[first, last) of a node's bytes, made to begin and end where chunks do."""
    length, chunk, end = plan.block_bytes(node), plan.chunk_bytes, plan.node_bytes(node)
    block, offset = divmod(first, length)
    low = block * length + offset // chunk * chunk
    block, offset = divmod(last - 1, length)
    high = block * length + min(length, (offset // chunk + 1) * chunk)
    return low, min(high, end)


def _check(kept: Atlas, wanted: Atlas) -> None:
    for spec in wanted.specs:
        found = kept.by_name.get(spec.name)
        if found is None or (found.shape, found.dtype) != (spec.shape, spec.dtype):
            have = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ValueError(
                f"restore: the snapshot must be of the same model, got {have} for {spec.name} {spec.dtype} {spec.shape}"
            )


def _batch(plan: SnapshotPlan, moves: Sequence[Move]) -> list[Batch]:
    if not moves:
        return []
    ranges: list[tuple[int, int]] = []
    for move in moves:
        first, last = widen(plan, move.node, move.first, move.last)
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return [Batch(moves[0].node, tuple(ranges), tuple(moves))]


def _moves(piece: Piece, entries: Sequence[tuple[str, int, Entry]]) -> Iterator[Move]:
    for node, base, entry in entries:
        overlap = piece.box.intersect(entry.piece.box)
        if overlap is not None:
            for part in _parts(overlap, entry):
                first, last = _span(part, entry)
                start = base + entry.offset
                yield Move(
                    tensor=piece.tensor,
                    dtype=entry.dtype,
                    node=node,
                    start=start,
                    source=entry.piece.box,
                    target=piece.box,
                    overlap=part,
                    first=start + first,
                    last=start + last,
                )


def _parts(overlap: Box, entry: Entry) -> Iterator[Box]:
    """The overlap, cut along its first dimension into parts that span about MOVE_BYTES of the stored piece."""
    if not overlap.shape:
        yield overlap
        return
    row = entry.nbytes // entry.piece.box.shape[0]
    rows = max(1, MOVE_BYTES // row)
    for start in range(0, overlap.shape[0], rows):
        yield overlap.cut(0, start, min(start + rows, overlap.shape[0]))


def _span(part: Box, entry: Entry) -> tuple[int, int]:
    """Bytes of the stored piece, from the part's first element to its last."""
    box = entry.piece.box
    if not box.shape:
        return 0, entry.nbytes
    strides = [math.prod(box.shape[dim + 1 :]) for dim in range(len(box.shape))]
    width = entry.nbytes // box.size
    first = sum((a - o) * s for a, o, s in zip(part.start, box.start, strides, strict=True))
    last = sum((b - 1 - o) * s for b, o, s in zip(part.stop, box.start, strides, strict=True))
    return first * width, (last + 1) * width

