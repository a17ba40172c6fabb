"""Shard: one file of a durable checkpoint, written by whoever holds its pieces.

    8 bytes   length of the header
    header    safetensors JSON, by band: `param/layers.0.attention.wq.weight[0:256,0:512]` -> dtype, shape, range
    data      extents, back to back, each in bands
    table     xxh3_64 of every unit, itself a safetensors tensor, `__hashes__`

Any safetensors reader opens it. Geometry fixes the header before a byte of data is touched, so pieces stream: their
buffers may be given as functions, called one at a time, each when its turn comes.

Rule of this file: a shard is written once under a name nobody else uses, and never changed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from fault_tolerance.checkpoints.buffers import DTYPES, Array, Bytes, array_view, byte_view
from fault_tolerance.checkpoints.index import Extent, ShardEntry
from fault_tolerance.checkpoints.storage import PART_BYTES, open_storage, paced
from fault_tolerance.checkpoints.units import Cut, cut
from fault_tolerance.hashing import unit_hashes
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box

HASHES = "__hashes__"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where every extent of a file lies; all of it follows from the pieces."""

    specs: dict[str, TensorSpec]
    extents: tuple[Extent, ...]  # of each piece
    num_hashes: int
    data_bytes: int


def write_shard(
    directory: str,
    name: str,
    pieces: Iterable[tuple[Piece, Any]],
    *,
    specs: Sequence[TensorSpec],
    max_rate_mb_s: float | None = None,
    taken: Callable[[int], None] = lambda num_bytes: None,
) -> ShardEntry:
    """Write pieces as one shard file of the checkpoint `directory`, durably; the first of the two phases of a save.

    Each piece comes with its bytes: a torch tensor, numpy array or memoryview, row-major, or a function that returns
    one. The file's name starts with `name` and is unique, so attempts never meet. Nothing is visible before `commit`.
    `taken` is told how many more bytes the storage has taken, as it takes them, over all its tries.
    Raises ValueError for pieces that do not fit `specs`, StorageError when the storage refuses.
    """
    pairs = [(piece, buffer) for piece, buffer in pieces if piece.box.size]
    plan = _plan([piece for piece, _ in pairs], specs)
    header = header_bytes(plan.extents, plan.specs, plan.num_hashes)
    file = f"{name}-{uuid.uuid4().hex[:8]}.safetensors"
    table = np.zeros(plan.num_hashes, np.uint64)

    def parts() -> Iterator[Bytes]:
        yield header
        yield from _told(_data(plan, [buffer for _, buffer in pairs], table, max_rate_mb_s), taken)
        yield byte_view(table)

    num_bytes = open_storage(directory).write(file, parts)
    shift = header.nbytes
    extents = tuple(Extent(e.tensor, e.box, e.offset + shift, e.first_hash) for e in plan.extents)
    return ShardEntry(file, num_bytes, shift + plan.data_bytes, plan.num_hashes, shard_digest(header, table), extents)


def header_bytes(extents: Sequence[Extent], specs: Mapping[str, TensorSpec], num_hashes: int) -> Bytes:
    """The safetensors header, with its length, for extents whose offsets count from the end of it."""
    fields: dict[str, Any] = {}
    end = 0
    for extent in extents:
        spec = specs[extent.tensor]
        code, stored = DTYPES[spec.dtype][0], cut(spec, extent.box)
        for band, (start, stop) in zip(stored.bands, pairwise(stored.starts), strict=True):
            end = extent.offset + stop
            fields[band_name(extent.tensor, band)] = _field(code, band.shape, extent.offset + start, end)
    at = -(-end // 8) * 8
    if at > end:  # the format allows no holes
        fields["__pad__"] = _field("U8", (at - end,), end, at)
    fields[HASHES] = _field("U64", (num_hashes,), at, at + 8 * num_hashes)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def band_name(tensor: str, band: Box) -> str:
    """How a safetensors reader sees a band: the tensor and its box."""
    return f"{tensor}[{','.join([f'{a}:{b}' for a, b in zip(band.start, band.stop, strict=True)])}]"


def shard_digest(header: Bytes, table: Array) -> str:
    """The digest of a `ShardEntry`."""
    return xxhash.xxh3_64_hexdigest(header.tobytes() + table.tobytes())


def _plan(pieces: Sequence[Piece], specs: Sequence[TensorSpec]) -> _Plan:
    by_name = {spec.name: spec for spec in specs}
    offset = first_hash = 0
    extents = []
    for piece in pieces:
        if piece.tensor not in by_name:
            raise ValueError(f"write_shard: {piece.tensor!r} is not a tensor of the state; check the specs")
        spec = by_name[piece.tensor]
        if piece.box.intersect(Box.whole(spec.shape)) != piece.box:
            raise ValueError(f"write_shard: {piece} sticks out of the shape {spec.shape} of its tensor")
        stored = cut(spec, piece.box)
        extents.append(Extent(spec.name, piece.box, offset, first_hash))
        offset += stored.starts[-1]
        first_hash += stored.num_units
    return _Plan(by_name, tuple(extents), first_hash, -(-offset // 8) * 8)


def _data(plan: _Plan, buffers: Sequence[Any], table: Array, max_rate_mb_s: float | None) -> Iterator[Bytes]:
    """The data section, in order; fills the table on the way."""
    return paced(_extents(plan, buffers, table), max_rate_mb_s)


def _told(parts: Iterable[Bytes], taken: Callable[[int], None]) -> Iterator[Bytes]:
    """The parts. A storage keeps one to itself before it sends any: what it has asked for beyond that, it has taken."""
    given = -PART_BYTES
    for part in parts:
        yield part
        if given + part.nbytes > 0:
            taken(given + part.nbytes - max(given, 0))
        given += part.nbytes


def _extents(plan: _Plan, buffers: Sequence[Any], table: Array) -> Iterator[Bytes]:
    end = 0
    for extent, buffer in zip(plan.extents, buffers, strict=True):
        spec, given = plan.specs[extent.tensor], buffer() if callable(buffer) else buffer
        stored = cut(spec, extent.box)
        whole = array_view(given, spec.dtype, extent.box.shape, where=f"write_shard: {Piece(extent.tensor, extent.box)}")
        data = _in_bands(whole, extent.box, stored)
        table[extent.first_hash : extent.first_hash + stored.num_units] = unit_hashes(data, stored.offsets)
        end = extent.offset + data.nbytes
        yield data
    yield np.zeros(plan.data_bytes - end, np.uint8)


def _in_bands(whole: Array, box: Box, stored: Cut) -> Bytes:
    """The bytes of a piece, band after band; the piece itself where it is one."""
    if len(stored.bands) == 1:
        return byte_view(whole)
    out = np.empty(whole.nbytes, np.uint8)
    for band, (start, stop) in zip(stored.bands, pairwise(stored.starts), strict=True):
        np.copyto(out[start:stop].view(whole.dtype).reshape(band.shape), whole[band.within(box)])
    return out


def _field(code: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
