"""Index: what a durable checkpoint holds, as data: logical tensors, and where each box of them lies.

    step_000123/
      node0-1f6b2c9e.safetensors     header | extents, back to back | hashes of their units
      node1-77aa01d2.safetensors
      index.json                     written last: the commit record

    extent   a piece as stored: contiguous bytes of one file (`units.py` says how they lie: in bands, these in units)
    unit     the bytes under one hash; the hashes of a file stand in a table at its end

The text is hashed as it stands, and there is a row for a piece and not for each of its bands: so opening a checkpoint
costs milliseconds, whatever the number of ranks that saved it.

Rule of this file: pure, apart from hashing its own text. Boxes for storage are ByteCheckpoint's idea (NSDI 2025, 3.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from fault_tolerance.checkpoints.buffers import item_bytes
from parallel.atlas import TensorSpec
from parallel.boxes import Box

FORMAT = "holdfast-checkpoint"
VERSION = 2


class OtherVersion(ValueError):
    """A checkpoint that another version of this program wrote: whole, but not ours to read."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stored piece of a tensor: from byte `offset` of a shard file; its first unit has hash number `first_hash`."""

    tensor: str
    box: Box
    offset: int
    first_hash: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file: its bytes, its table of hashes (`num_hashes` uint64 from byte `hashes_at`) and its extents.

    `digest` is the xxh3_64 of header and table, which between them fix every byte of the file.
    """

    file: str
    num_bytes: int
    hashes_at: int
    num_hashes: int
    digest: str
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Index:
    """The commit record: logical tensors, the files that hold them, and all other state as plain JSON (`extra`)."""

    specs: tuple[TensorSpec, ...]
    shards: tuple[ShardEntry, ...]
    extra: dict[str, Any]

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """The specs by tensor name."""
        return {spec.name: spec for spec in self.specs}

    @cached_property
    def extents(self) -> dict[str, tuple[tuple[ShardEntry, Extent], ...]]:
        """For each tensor, the extents that hold it."""
        found: dict[str, list[tuple[ShardEntry, Extent]]] = {spec.name: [] for spec in self.specs}
        for shard in self.shards:
            for extent in shard.extents:
                found[extent.tensor].append((shard, extent))
        return {name: tuple(pairs) for name, pairs in found.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the logical tensors."""
        return sum(item_bytes(s.dtype) * math.prod(s.shape) for s in self.specs)


def check_tiling(specs: Iterable[TensorSpec], shards: Iterable[ShardEntry]) -> None:
    """Raise ValueError unless the extents of the shards cover every tensor once, and nothing else."""
    boxes: dict[str, list[Box]] = {spec.name: [] for spec in specs}
    for shard in shards:
        for extent in shard.extents:
            if extent.tensor not in boxes:
                raise ValueError(
                    f"checkpoint: {shard.file} holds {extent.tensor!r}, which is not a tensor of the state"
                )
            boxes[extent.tensor].append(extent.box)
    for spec in specs:
        _check_tensor(spec, boxes[spec.name])


def _check_tensor(spec: TensorSpec, boxes: Sequence[Box]) -> None:
    covered = sum(box.size for box in boxes)
    if covered != math.prod(spec.shape):
        raise ValueError(
            f"checkpoint: the pieces of {spec.name} must cover {math.prod(spec.shape)} elements, got {covered}"
        )
    if not spec.shape or len(boxes) < 2:
        return
    start, stop = np.array([b.start for b in boxes]), np.array([b.stop for b in boxes])
    if start.min() < 0 or (stop > np.array(spec.shape)).any():
        raise ValueError(f"checkpoint: a piece of {spec.name} sticks out of its shape {spec.shape}")
    common = np.minimum(stop[:, None], stop[None]) - np.maximum(start[:, None], start[None])
    if (common > 0).all(-1).sum() > len(boxes):  # each one meets itself
        raise ValueError(f"checkpoint: pieces of {spec.name} overlap; every element must be owned by one rank")


def dump(index: Index) -> str:
    """The index as JSON, one tensor a line; the first line has the hash of all that follows it."""
    number = {shard.file: i for i, shard in enumerate(index.shards)}
    shards = [{k: getattr(shard, k) for k in _SHARD_KEYS} for shard in index.shards]
    tensors = [
        {**asdict(spec), "extents": [[number[shard.file], *_row(e)] for shard, e in index.extents[spec.name]]}
        for spec in index.specs
    ]
    body = ",\n".join([f'"extra": {json.dumps(index.extra)}', _rows("shards", shards), _rows("tensors", tensors)]) + "}\n"
    return f"{_head(_hash(body))}\n{body}"


def load(text: str, *, where: str) -> Index:
    """The inverse of `dump`. Raises ValueError when the text is torn, changed or foreign, OtherVersion."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: must be JSON, but {error}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"{where}: is not the index of a checkpoint (no format {FORMAT!r})")
    if plain.get("version") != VERSION:
        raise OtherVersion(f"{where}: version must be {VERSION}, got {plain.get('version')}; use the Holdfast that wrote it")
    head, _, body = text.partition("\n")
    if head != _head(_hash(body)):
        raise ValueError(f"{where}: was changed after it was written (its own hash does not match)")
    return _index(plain)


def entry_to_plain(entry: ShardEntry) -> dict[str, Any]:
    """A shard entry as JSON, for those that send it to the one who commits."""
    rows = [[e.tensor, *_row(e)] for e in entry.extents]
    return {**{k: getattr(entry, k) for k in _SHARD_KEYS}, "extents": rows}


def entry_from_plain(plain: Mapping[str, Any]) -> ShardEntry:
    """The inverse of `entry_to_plain`."""
    extents = tuple(_extent(row[0], row[1:]) for row in plain["extents"])
    return ShardEntry(**{k: plain[k] for k in _SHARD_KEYS}, extents=extents)


_SHARD_KEYS = ("file", "num_bytes", "hashes_at", "num_hashes", "digest")


def _head(own_hash: str) -> str:
    """The first line, which so is fixed by the others."""
    return f'{{"format": "{FORMAT}", "version": {VERSION}, "hash": "xxh3_64", "self": "{own_hash}",'


def _index(body: Mapping[str, Any]) -> Index:
    extents: list[list[Extent]] = [[] for _ in body["shards"]]
    specs = []
    for row in body["tensors"]:
        specs.append(
            TensorSpec(
                row["name"], tuple(row["shape"]), row["dtype"], row["tp_dim"], tuple(row["units"]), row.get("frozen", False)
            ),
        )
        for number, *rest in row["extents"]:
            extents[number].append(_extent(row["name"], rest))
    shards = tuple(
        ShardEntry(**shard, extents=tuple(sorted(own, key=lambda e: e.offset)))
        for shard, own in zip(body["shards"], extents, strict=True)
    )
    return Index(tuple(specs), shards, body["extra"])


def _extent(tensor: str, row: Sequence[int]) -> Extent:
    offset, first, *corners = row
    half = len(corners) // 2
    return Extent(tensor, Box(tuple(corners[:half]), tuple(corners[half:])), offset, first)


def _row(extent: Extent) -> list[int]:
    return [extent.offset, extent.first_hash, *extent.box.start, *extent.box.stop]


def _rows(key: str, rows: Sequence[Any]) -> str:
    return f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "]"


def _hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
