"""Verify: stored bytes against the hashes that were taken when they were saved.

    header    fixed by the geometry in the index     } together under the shard's digest
    table     one hash for every unit                }
    units     each under its hash; the pad is zeros

so every byte of a checkpoint is under some hash, and the index is under its own.

Rule of this file: it finds and reports; what to do about damage is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fault_tolerance.checkpoints.buffers import Array, Bytes, item_bytes
from fault_tolerance.checkpoints.index import Extent, Index, ShardEntry
from fault_tolerance.checkpoints.shard import header_bytes, shard_digest
from fault_tolerance.checkpoints.storage import Storage, StorageError
from fault_tolerance.checkpoints.units import Offsets, cut
from fault_tolerance.hashing import unit_hashes

_STEP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a stored file, and the tensor it concerns (None: the file as such)."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor + ': ' if self.tensor else ''}{self.what}"


class DamageError(RuntimeError):
    """Stored bytes are not what was saved: a hash, a length or a file is wrong. `damages` says where."""

    def __init__(self, damages: Sequence[Damage]) -> None:
        super().__init__("; ".join(map(str, damages)))
        self.damages = tuple(damages)


def compare_units(file: str, extent: Extent, offsets: Offsets, data: Bytes, expected: Array) -> list[Damage]:
    """What is wrong with units of an extent, as read, against their hashes; `offsets` tells where they lie in it."""
    differ = unit_hashes(data, offsets) != expected
    if not differ.any():
        return []
    wrong = np.flatnonzero(differ)
    at = extent.offset + int(offsets[wrong[0]])
    what = f"{len(wrong)} of {len(expected)} units have a wrong hash, the first at byte {at}"
    return [Damage(file, extent.tensor, what)]


def verify_shard(
    storage: Storage, index: Index, shard: ShardEntry, sizes: Mapping[str, int], progress: Callable[[int], None]
) -> Iterator[Damage]:
    """Re-hash every byte of a shard file. `progress` is told the bytes done since last time."""
    where = f"{storage.url}/{shard.file}"
    if sizes.get(shard.file) != shard.num_bytes:
        yield Damage(where, None, f"must have {shard.num_bytes} bytes, got {sizes.get(shard.file)}")
        return
    try:
        table = _read(storage, shard, shard.hashes_at, 8 * shard.num_hashes).view(np.uint64)
        header = _expected_header(index, shard)
        stored = _read(storage, shard, 0, header.nbytes)
        if not np.array_equal(header, stored) or shard_digest(stored, table) != shard.digest:
            yield Damage(where, None, "header or table of hashes was changed")
        progress(table.nbytes + header.nbytes)
        end = header.nbytes
        for extent in shard.extents:
            yield from _verify_extent(storage, index, shard, extent, table, progress)
            end = extent.offset + _num_bytes(index, extent)
        if _read(storage, shard, end, shard.hashes_at - end).any():
            yield Damage(where, None, f"the pad at byte {end} is not zero")
    except StorageError as error:
        yield Damage(where, None, str(error))


def _verify_extent(
    storage: Storage,
    index: Index,
    shard: ShardEntry,
    extent: Extent,
    table: Array,
    progress: Callable[[int], None],
) -> Iterator[Damage]:
    spec = index.by_name[extent.tensor]
    offsets = cut(spec, extent.box).offsets
    for first, last in _steps(offsets):
        start, stop = int(offsets[first]), int(offsets[last])
        data = _read(storage, shard, extent.offset + start, stop - start)
        expected = table[extent.first_hash + first : extent.first_hash + last]
        yield from compare_units(f"{storage.url}/{shard.file}", extent, offsets[first : last + 1], data, expected)
        progress(data.nbytes)


def _steps(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Ranges of units of about 16 MiB."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _STEP_BYTES))
        last = min(max(last, first + 1), len(offsets) - 1)
        yield first, last
        first = last


def _expected_header(index: Index, shard: ShardEntry) -> Bytes:
    """The header as it must be: geometry fixes every byte of it."""
    base = min((extent.offset for extent in shard.extents), default=shard.hashes_at)
    relative = [replace(extent, offset=extent.offset - base) for extent in shard.extents]
    return header_bytes(relative, index.by_name, shard.num_hashes)


def _read(storage: Storage, shard: ShardEntry, offset: int, size: int) -> Bytes:
    out = np.empty(size, np.uint8)
    storage.read_into(shard.file, offset, [out])
    return out


def _num_bytes(index: Index, extent: Extent) -> int:
    return item_bytes(index.by_name[extent.tensor].dtype) * extent.box.size
