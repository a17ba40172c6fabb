"""Shard: one file of a durable checkpoint, written by whoever holds its pieces.

    8 bytes   length of the header
    header    safetensors JSON: `param/layers.0.attention.wq.weight[0:256,0:512]` -> dtype, shape, range
    data      extents, back to back
    table     xxh3_64 of every unit, itself a safetensors tensor, `__hashes__`

Any safetensors reader opens it. Geometry fixes the header before a byte of data is touched, so pieces stream: their
buffers may be given as functions, called one at a time, each when its turn comes.

Rule of this file: a shard is written once under a name nobody else uses, and never changed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from fault_tolerance.buffers import DTYPES, Array, Bytes, array_view, byte_view, item_bytes
from fault_tolerance.index import Extent, ShardEntry
from fault_tolerance.storage import open_storage, paced
from fault_tolerance.units import Offsets, bands, unit_offsets
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box

HASHES = "__hashes__"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where every extent of a file lies; all of it follows from the pieces."""

    specs: dict[str, TensorSpec]
    pieces: tuple[Piece, ...]
    extents: tuple[tuple[Extent, ...], ...]  # of each piece
    num_hashes: int
    data_bytes: int

    @property
    def flat(self) -> tuple[Extent, ...]:
        return tuple(extent for own in self.extents for extent in own)


def write_shard(
    directory: str,
    name: str,
    pieces: Iterable[tuple[Piece, Any]],
    *,
    specs: Sequence[TensorSpec],
    max_rate_mb_s: float | None = None,
) -> ShardEntry:
    """Write pieces as one shard file of the checkpoint `directory`, durably; the first of the two phases of a save.

    Each piece comes with its bytes: a torch tensor, numpy array or memoryview, row-major, or a function that returns
    one. The file's name starts with `name` and is unique, so attempts never meet. Nothing is visible before `commit`.
    Raises ValueError for pieces that do not fit `specs`, StorageError when the storage refuses.
    """
    pairs = [(piece, buffer) for piece, buffer in pieces if piece.box.size]
    plan = _plan([piece for piece, _ in pairs], specs)
    header = header_bytes(plan.flat, {s.name: s.dtype for s in specs}, plan.num_hashes)
    file = f"{name}-{uuid.uuid4().hex[:8]}.safetensors"
    table = np.zeros(plan.num_hashes, np.uint64)

    def parts() -> Iterator[Bytes]:
        yield header
        yield from _data(plan, [buffer for _, buffer in pairs], table, max_rate_mb_s)
        yield byte_view(table)

    num_bytes = open_storage(directory).write(file, parts)
    shift = header.nbytes
    extents = tuple(Extent(e.tensor, e.box, e.offset + shift, e.first_hash) for e in plan.flat)
    return ShardEntry(file, num_bytes, shift + plan.data_bytes, plan.num_hashes, shard_digest(header, table), extents)


def header_bytes(extents: Sequence[Extent], dtypes: dict[str, str], num_hashes: int) -> Bytes:
    """The safetensors header, with its length, for extents whose offsets count from the end of it."""
    fields: dict[str, Any] = {}
    end = 0
    for extent in extents:
        code, width = DTYPES[dtypes[extent.tensor]]
        end = extent.offset + width * extent.box.size
        fields[extent_name(extent)] = _field(code, extent.box.shape, extent.offset, end)
    at = -(-end // 8) * 8
    if at > end:  # the format allows no holes
        fields["__pad__"] = _field("U8", (at - end,), end, at)
    fields[HASHES] = _field("U64", (num_hashes,), at, at + 8 * num_hashes)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def extent_name(extent: Extent) -> str:
    """How a safetensors reader sees an extent: the tensor and its box."""
    box = ",".join(f"{a}:{b}" for a, b in zip(extent.box.start, extent.box.stop, strict=True))
    return f"{extent.tensor}[{box}]"


def shard_digest(header: Bytes, table: Array) -> str:
    """The digest of a `ShardEntry`."""
    return xxhash.xxh3_64_hexdigest(header.tobytes() + table.tobytes())


def unit_hashes(data: Bytes, offsets: Offsets) -> Array:
    """xxh3_64 of the units of the data, which starts at the first offset and ends at the last."""
    view, edges = data.data, (offsets - offsets[0]).tolist()
    hashes = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(edges)]
    return np.array(hashes, np.uint64)


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
        own = []
        width = item_bytes(spec.dtype)
        for box in bands(spec, piece.box):
            own.append(Extent(spec.name, box, offset, first_hash))
            offset += box.size * width
            first_hash += len(unit_offsets(spec, box)) - 1
        extents.append(tuple(own))
    return _Plan(by_name, tuple(pieces), tuple(extents), first_hash, -(-offset // 8) * 8)


def _data(plan: _Plan, buffers: Sequence[Any], table: Array, max_rate_mb_s: float | None) -> Iterator[Bytes]:
    """The data section, in order; fills the table on the way."""
    return paced(_extents(plan, buffers, table), max_rate_mb_s)


def _extents(plan: _Plan, buffers: Sequence[Any], table: Array) -> Iterator[Bytes]:
    end = 0
    for piece, buffer, extents in zip(plan.pieces, buffers, plan.extents, strict=True):
        spec, given = plan.specs[piece.tensor], buffer() if callable(buffer) else buffer
        whole = array_view(given, spec.dtype, piece.box.shape, where=f"write_shard: {piece}")
        for extent in extents:
            data = byte_view(np.ascontiguousarray(whole[extent.box.within(piece.box)]))
            hashes = unit_hashes(data, unit_offsets(spec, extent.box))
            table[extent.first_hash : extent.first_hash + len(hashes)] = hashes
            end = extent.offset + data.nbytes
            yield data
    yield np.zeros(plan.data_bytes - end, np.uint8)


def _field(code: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
