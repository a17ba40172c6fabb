"""Reads: which bytes of which files a loader needs. Intersect the boxes it wants with the boxes stored.

    a band (rows x units)              wanted: rows 5 to 8
    +------------+ unit 0
    |            |
    +------------+ unit 1    <- read from here,
    |   #######  |
    +------------+ unit 2    <- to the end of this one: 2 units, and both can be verified
    |   #######  |
    +------------+

How a wanted box lies in a stored one is the same for all layers, a parameter and its moments: it is worked out once.
Large overlaps are split, so that several threads share the work and scratch memory is small.

Rule of this file: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fault_tolerance.checkpoints.buffers import item_bytes
from fault_tolerance.checkpoints.index import Extent, Index, ShardEntry
from fault_tolerance.checkpoints.units import Offsets, cut
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box

SLAB_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """What a wanted box takes out of one band: `rows` begin at byte `at` of the extent; `source` of them go to `place`."""

    at: int
    rows: tuple[int, ...]
    source: tuple[slice, ...]
    place: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """How (a share of) a wanted box lies in an extent.

    `spans` are the ranges of units to read, [first, last), ascending and apart from each other; unit i begins at byte
    `offsets[i]` of the extent. All rows and units lie in its bytes [low, high). `direct` is set where the units are the
    overlap and nothing else, and where its elements follow each other in the wanted box: from that byte of it on.
    """

    offsets: Offsets
    spans: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]
    low: int
    high: int
    num_bytes: int
    num_hashes: int
    direct: int | None


@dataclass(frozen=True, slots=True)
class Read:
    """A share of a wanted piece, out of one extent."""

    piece: Piece
    shard: ShardEntry
    extent: Extent
    fit: Fit


def plan_reads(index: Index, wanted: Iterable[Piece]) -> list[Read]:
    """The reads that fill the wanted pieces, by file and offset. Raises ValueError for what the index does not hold."""
    reads = [read for piece in wanted for read in _reads_of(index, piece)]
    return sorted(reads, key=lambda read: (read.shard.file, read.extent.offset, read.fit.spans))


def groups(reads: Iterable[Read]) -> list[list[Read]]:
    """Planned reads in groups of one file and about 16 MiB: the work of one thread at a time."""
    out: list[list[Read]] = []
    total = 0
    for read in reads:
        if not out or out[-1][0].shard is not read.shard or total + read.fit.num_bytes > SLAB_BYTES:
            out.append([])
            total = 0
        out[-1].append(read)
        total += read.fit.num_bytes
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
    for shard, extent in index.extents[piece.tensor]:
        for fit in _fits(spec.shape, spec.tp_dim, spec.dtype, extent.box, piece.box):
            yield Read(piece, shard, extent, fit)


@lru_cache(maxsize=1 << 14)
def _fits(shape: tuple[int, ...], tp_dim: int | None, dtype: str, stored: Box, wanted: Box) -> tuple[Fit, ...]:
    """How a wanted box lies in a stored one, in shares of about `SLAB_BYTES`."""
    if wanted.intersect(stored) is None:
        return ()
    spec, width = TensorSpec("", shape, dtype, tp_dim, ()), item_bytes(dtype)
    shares: list[list[_Slab]] = []
    for slab in _slabs(spec, stored, wanted, width):
        if not shares or slab.high - shares[-1][0].low > SLAB_BYTES:
            shares.append([])
        shares[-1].append(slab)
    return tuple(_fit(cut(spec, stored).offsets, share, wanted, width) for share in shares)


@dataclass(frozen=True, slots=True)
class _Slab:
    """One part of a fit, with its units and bytes."""

    part: Part
    overlap: Box
    spans: tuple[tuple[int, int], ...]
    low: int
    high: int


def _fit(offsets: Offsets, slabs: list[_Slab], wanted: Box, width: int) -> Fit:
    spans = tuple(_joined(span for slab in slabs for span in slab.spans))
    num_bytes = sum(int(offsets[last] - offsets[first]) for first, last in spans)
    direct = None
    if len(slabs) == 1 and num_bytes == slabs[0].overlap.size * width:
        runs = list(_first_two(slabs[0].overlap.runs(wanted)))
        direct = runs[0][0] * width if len(runs) == 1 else None
    parts, num_hashes = tuple(slab.part for slab in slabs), sum(last - first for first, last in spans)
    return Fit(offsets, spans, parts, slabs[0].low, max(slab.high for slab in slabs), num_bytes, num_hashes, direct)


def _slabs(spec: TensorSpec, stored: Box, wanted: Box, width: int) -> Iterator[_Slab]:
    """The overlaps with each band, large ones in slabs of rows that end where units end."""
    lie = cut(spec, stored)
    for number, band in enumerate(lie.bands):
        overlap = wanted.intersect(band)
        if overlap is None:
            continue
        start, first, last = lie.starts[number], lie.firsts[number], lie.firsts[number + 1]
        offsets = lie.offsets[first : last + 1] - start
        row = width * math.prod(band.shape[1:])
        for slab in _in_slabs(overlap, band, offsets, row):
            spans = tuple(_spans(slab, band, offsets, width))
            edges = [(slab_edge - band_start) * row for slab_edge, band_start in zip(*_rows(slab, band), strict=True)]
            low, high = min(edges[0], int(offsets[spans[0][0]])), max(edges[1], int(offsets[spans[-1][1]]))
            inner = _slices(slab, band)[1:]
            rows = ((edges[1] - edges[0]) // row if row else 0, *band.shape[1:])
            part = Part(start + edges[0], rows, (slice(None), *inner), _slices(slab, wanted))
            if not spec.shape:
                part = Part(start, (), (), ())
            yield _Slab(part, slab, tuple((first + a, first + b) for a, b in spans), start + low, start + high)


def _rows(inner: Box, outer: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of a box, and the first row of the box that it lies in, twice; a scalar is one row."""
    if not inner.start:
        return (0, 1), (0, 0)
    return (inner.start[0], inner.stop[0]), (outer.start[0], outer.start[0])


def _in_slabs(overlap: Box, stored: Box, offsets: Offsets, row: int) -> Iterator[Box]:
    if offsets[-1] <= SLAB_BYTES or not overlap.start:
        yield overlap
        return
    start, stop = (edge - stored.start[0] for edge in (overlap.start[0], overlap.stop[0]))
    edges = offsets[offsets % row == 0] // row
    low = start
    while low < stop:
        after = edges[np.searchsorted(edges, low + max(1, SLAB_BYTES // row)) :]
        high = min(stop, int(after[0])) if len(after) else stop
        yield overlap.cut(0, low - start, high - start)
        low = high


def _spans(overlap: Box, stored: Box, offsets: Offsets, width: int) -> Iterator[tuple[int, int]]:
    """The units of a band that the overlap touches, as merged ranges."""
    if overlap == stored:
        yield 0, len(offsets) - 1
        return
    runs = np.array(list(overlap.runs(stored))) * width
    firsts = np.searchsorted(offsets, runs[:, 0], side="right") - 1
    lasts = np.searchsorted(offsets, runs.sum(axis=1))
    breaks = np.flatnonzero(firsts[1:] > lasts[:-1]) + 1
    for a, b in zip([0, *breaks], [*breaks, len(runs)], strict=True):
        yield int(firsts[a]), int(lasts[b - 1])


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges that follow each other, as one."""
    start, end = -1, -1
    for first, last in spans:
        if first != end:
            if end >= 0:
                yield start, end
            start = first
        end = last
    yield start, end


def _first_two(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for run, _ in zip(runs, range(2), strict=False):
        yield run


def _slices(inner: Box, outer: Box) -> tuple[slice[Any, Any, Any], ...]:
    """`inner.within(outer)`, where it is known that it lies inside."""
    return tuple(map(slice, map(int.__sub__, inner.start, outer.start), map(int.__sub__, inner.stop, outer.start)))
