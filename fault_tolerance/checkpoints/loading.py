"""Loading: planned reads of one file, carried out: read, verify, place.

    in the file      data of extent 7 | data of extent 8 |  ...  | hashes of 7 | hashes of 8
                     `---- one scattered read ----------'         `---- one more ---------'
    in memory        straight into the target, or into scratch rows that are cut and copied

Neighbours in the file are fetched by one request, whatever number of places they go to.

Rule of this file: a byte is placed first where that saves a copy, but nothing counts as loaded before its hash fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fault_tolerance.checkpoints.buffers import Array, Bytes, byte_view
from fault_tolerance.checkpoints.reads import Fit, Read
from fault_tolerance.checkpoints.storage import Storage
from fault_tolerance.checkpoints.units import Offsets
from fault_tolerance.checkpoints.verify import Damage, compare_units
from parallel.atlas import Piece


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a group of reads cost, and the damage found."""

    bytes_read: int
    requests: int
    damages: tuple[Damage, ...]


class Target:
    """Memory to be filled: its bytes, and the elements they are."""

    __slots__ = ("array", "flat")

    def __init__(self, array: Array) -> None:
        self.array, self.flat = array, byte_view(array)


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of units of one read that follow each other: where its bytes go, and the room for its hashes."""

    read: Read
    units: Offsets
    data_at: int
    data: Bytes
    hashes_at: int
    hashes: Array


def load_group(storage: Storage, group: Sequence[Read], targets: Mapping[Piece, Target]) -> Loaded:
    """Fill the parts of the targets that these reads, all of one file, are for. Raises StorageError."""
    hashes = np.empty(sum([read.fit.num_hashes for read in group]), np.uint64)
    spans: list[_Span] = []
    scratches: list[tuple[Read, Bytes]] = []
    done = 0
    for read in group:
        fit, target = read.fit, targets[read.piece]
        if fit.direct is not None:
            memory = target.flat[fit.direct : fit.direct + fit.num_bytes]
        else:
            memory = np.empty(fit.high - fit.low, np.uint8)
            scratches.append((read, memory))
        spans += _spans(read, memory, hashes[done : done + fit.num_hashes])
        done += fit.num_hashes
    wanted = [(span.data_at, span.data) for span in spans] + [(s.hashes_at, byte_view(s.hashes)) for s in spans]
    requests = list(_merged(wanted))
    for offset, outs in requests:
        storage.read_into(group[0].shard.file, offset, outs)
    file = f"{storage.url}/{group[0].shard.file}"
    damages = [damage for span in spans for damage in compare_units(file, span.read.extent, span.units, span.data, span.hashes)]
    for read, memory in scratches:
        _place(read.fit, memory, targets[read.piece].array)
    return Loaded(sum([out.nbytes for _, out in wanted]), len(requests), tuple(damages))


def _spans(read: Read, memory: Bytes, hashes: Array) -> Iterator[_Span]:
    """The spans of a read whose units go to `memory`: that holds the extent from byte `low` on."""
    fit, done = read.fit, 0
    for first, last in fit.spans:
        units = fit.offsets[first : last + 1]
        start, stop = int(units[0]), int(units[-1])
        yield _Span(
            read,
            units,
            read.extent.offset + start,
            memory[start - fit.low : stop - fit.low],
            read.shard.hashes_at + 8 * (read.extent.first_hash + first),
            hashes[done : done + last - first],
        )
        done += last - first


def _place(fit: Fit, memory: Bytes, target: Array) -> None:
    """Copy what is wanted out of the rows, once they are filled."""
    for part in fit.parts:
        start = part.at - fit.low
        rows = memory[start : start + target.itemsize * math.prod(part.rows)].view(target.dtype).reshape(part.rows)
        target[part.place] = rows[part.source]


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
