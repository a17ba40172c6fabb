"""Reads: which bytes of which files a loader needs. Intersect the boxes it wants with the boxes stored.

    stored extent (rows x units)       wanted: rows 5 to 8
    +------------+ unit 0
    |            |
    +------------+ unit 1    <- read from here,
    |   #######  |
    +------------+ unit 2    <- to the end of this one: 2 units, and both can be verified
    |   #######  |
    +------------+

Large overlaps are split into slabs of rows, so that several threads share the work and scratch memory is small.

Rule of this file: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fault_tolerance.buffers import item_bytes
from fault_tolerance.index import Extent, Index, ShardEntry
from fault_tolerance.units import Offsets, unit_offsets
from parallel.atlas import Piece
from parallel.boxes import Box

SLAB_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Read:
    """Part `overlap` of a wanted piece, out of one extent.

    `spans` are the ranges of units to read, [first, last), ascending and apart from each other; `offsets` tells where
    the units of the extent lie in it, in bytes.
    """

    piece: Piece
    shard: ShardEntry
    extent: Extent
    overlap: Box
    spans: tuple[tuple[int, int], ...]
    offsets: Offsets

    @property
    def num_bytes(self) -> int:
        """Bytes of data that are read."""
        return sum(int(self.offsets[last] - self.offsets[first]) for first, last in self.spans)


def plan_reads(index: Index, wanted: Iterable[Piece]) -> list[Read]:
    """The reads that fill the wanted pieces, by file and offset. Raises ValueError for what the index does not hold."""
    reads = [read for piece in wanted for read in _reads_of(index, piece)]
    return sorted(reads, key=lambda read: (read.shard.file, read.extent.offset, read.spans))


def groups(reads: Iterable[Read]) -> list[list[Read]]:
    """Planned reads in groups of one file and about 16 MiB: the work of one thread at a time."""
    out: list[list[Read]] = []
    size = 0
    for read in reads:
        if not out or out[-1][0].shard is not read.shard or size + read.num_bytes > SLAB_BYTES:
            out.append([])
            size = 0
        out[-1].append(read)
        size += read.num_bytes
    return out


def needed_bytes(index: Index, wanted: Iterable[Piece]) -> int:
    """Bytes of the wanted pieces: what a loader would read that could read single elements."""
    return sum(piece.box.size * item_bytes(index.by_name[piece.tensor].dtype) for piece in wanted)


def _reads_of(index: Index, piece: Piece) -> Iterator[Read]:
    if piece.tensor not in index.by_name:
        raise ValueError(f"checkpoint: holds no tensor {piece.tensor!r}; the model must be the one that was saved")
    spec = index.by_name[piece.tensor]
    if piece.box.size and piece.box.intersect(Box.whole(spec.shape)) != piece.box:
        raise ValueError(f"checkpoint: {piece.tensor} has shape {spec.shape}, so it has no box {piece.box}")
    width = item_bytes(spec.dtype)
    for shard, extent in index.extents[piece.tensor]:
        overlap = piece.box.intersect(extent.box)
        if overlap is not None:
            offsets = unit_offsets(spec, extent.box)
            for slab in _slabs(overlap, extent.box, offsets, width):
                yield Read(piece, shard, extent, slab, tuple(_spans(slab, extent.box, offsets, width)), offsets)


def _slabs(overlap: Box, stored: Box, offsets: Offsets, width: int) -> Iterator[Box]:
    """The overlap in slabs of rows that end where units end."""
    if offsets[-1] <= SLAB_BYTES or not overlap.start:
        yield overlap
        return
    row = width * math.prod(stored.shape[1:])
    start, stop = (edge - stored.start[0] for edge in (overlap.start[0], overlap.stop[0]))
    edges = offsets[offsets % row == 0] // row
    low = start
    while low < stop:
        after = edges[np.searchsorted(edges, low + max(1, SLAB_BYTES // row)) :]
        high = min(stop, int(after[0])) if len(after) else stop
        yield overlap.cut(0, low - start, high - start)
        low = high


def _spans(overlap: Box, stored: Box, offsets: Offsets, width: int) -> Iterator[tuple[int, int]]:
    """The units that the overlap touches, as merged ranges."""
    if overlap == stored:
        yield 0, len(offsets) - 1
        return
    runs = np.array(list(overlap.runs(stored))) * width
    firsts = np.searchsorted(offsets, runs[:, 0], side="right") - 1
    lasts = np.searchsorted(offsets, runs.sum(axis=1))
    breaks = np.flatnonzero(firsts[1:] > lasts[:-1]) + 1
    for a, b in zip([0, *breaks], [*breaks, len(runs)], strict=True):
        yield int(firsts[a]), int(lasts[b - 1])
