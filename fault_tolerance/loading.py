"""Loading: planned reads of one file, carried out: read, verify, place.

    in the file      data of extent 7 | data of extent 8 |  ...  | hashes of 7 | hashes of 8
                     `---- one scattered read ----------'         `---- one more ---------'
    in memory        straight into the target, or into scratch rows that are cut and copied

Neighbours in the file are fetched by one request, whatever number of places they go to.

Rule of this file: a byte is placed first where that saves a copy, but nothing counts as loaded before its hash fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fault_tolerance.buffers import Array, Bytes, byte_view
from fault_tolerance.reads import Read
from fault_tolerance.storage import Storage
from fault_tolerance.verify import Damage, compare_units
from parallel.atlas import Piece
from parallel.boxes import Box


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a group of reads cost, and the damage found."""

    bytes_read: int
    requests: int
    damages: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    """A merged range of units of one read: where its data goes, and the room for its hashes."""

    read: Read
    first: int
    last: int
    data: Bytes
    hashes: Array

    @property
    def data_at(self) -> int:
        return self.read.extent.offset + int(self.read.offsets[self.first])

    @property
    def hashes_at(self) -> int:
        return self.read.shard.hashes_at + 8 * (self.read.extent.first_hash + self.first)


def load_group(storage: Storage, group: Sequence[Read], targets: Mapping[Piece, Array]) -> Loaded:
    """Fill the parts of the targets that these reads, all of one file, are for. Raises StorageError."""
    spans: list[_Span] = []
    cuts: list[Callable[[], None]] = []
    for read in group:
        place = _place(read, targets[read.piece])
        if place.flags.c_contiguous and len(read.spans) == 1 and read.num_bytes == place.nbytes:
            spans += _spans(read, byte_view(place), base=int(read.offsets[read.spans[0][0]]))
        else:
            scratch = _Scratch.of(read, place)
            spans += _spans(read, scratch.memory, base=scratch.base)
            cuts.append(scratch.cut)
    wanted = [(span.data_at, span.data) for span in spans] + [(s.hashes_at, byte_view(s.hashes)) for s in spans]
    requests = list(_merged(wanted))
    for offset, outs in requests:
        storage.read_into(group[0].shard.file, offset, outs)
    damages = [damage for span in spans for damage in _compare(storage, span)]
    for cut in cuts:
        cut()
    return Loaded(sum(out.nbytes for _, out in wanted), len(requests), tuple(damages))


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Rows of an extent, laid out from its byte `base` on, for an overlap that is not simply a range of its bytes."""

    place: Array
    memory: Bytes
    base: int
    overlap: Array

    @staticmethod
    def of(read: Read, place: Array) -> _Scratch:
        """Room for the rows that the overlap lies in, and for the units that stick out of them."""
        stored, inner = read.extent.box, read.extent.box.shape[1:]
        row = place.itemsize * math.prod(inner)
        first, last = (row * (edge - stored.start[0]) for edge in (read.overlap.start[0], read.overlap.stop[0]))
        low = min(first, int(read.offsets[read.spans[0][0]]))
        high = max(last, int(read.offsets[read.spans[-1][1]]))
        memory = np.empty(high - low, np.uint8)
        rows = memory[first - low : last - low].view(place.dtype).reshape(-1, *inner)
        return _Scratch(place, memory, low, rows[(slice(None), *_slices(read.overlap, stored)[1:])])

    def cut(self) -> None:
        """Copy the overlap out of the rows, once they are filled."""
        np.copyto(self.place, self.overlap)


def _place(read: Read, target: Array) -> Array:
    """The part of the target that the read fills, as a view."""
    part: Array = target[(*_slices(read.overlap, read.piece.box), ...)]  # the dots: a view of a scalar too
    return part


def _slices(inner: Box, outer: Box) -> tuple[Any, ...]:
    """`inner.within(outer)`, where the plan made sure that it lies inside: this is called for every read."""
    return tuple(map(slice, map(int.__sub__, inner.start, outer.start), map(int.__sub__, inner.stop, outer.start)))


def _spans(read: Read, memory: Bytes, *, base: int) -> Iterator[_Span]:
    """The spans of a read whose units go to `memory`, which begins at byte `base` of the extent."""
    for first, last in read.spans:
        start, stop = int(read.offsets[first]) - base, int(read.offsets[last]) - base
        yield _Span(read, first, last, memory[start:stop], np.empty(last - first, np.uint64))


def _compare(storage: Storage, span: _Span) -> list[Damage]:
    file = f"{storage.url}/{span.read.shard.file}"
    return compare_units(file, span.read.extent, span.read.offsets[span.first : span.last + 1], span.data, span.hashes)


def _merged(wanted: list[tuple[int, Bytes]]) -> Iterator[tuple[int, list[Bytes]]]:
    """Ranges that follow each other in the file, as one scattered read each."""
    start, end, outs = -1, -1, list[Bytes]()
    for at, out in sorted(wanted, key=lambda item: item[0]):
        if at != end and outs:
            yield start, outs
            outs = []
        if not outs:
            start = at
        outs.append(out)
        end = at + out.nbytes
    if outs:
        yield start, outs
