"""Checkpoint: a durable copy of the training state that any layout loads directly.

    phase 1, every holder:   entry = write_shard("ckpt/step_000123", "node0", pieces, specs=specs)
    phase 2, one of them:    commit("ckpt/step_000123", entries, specs=specs, extra={"step": 123, ...})
    a loader, any layout:    Checkpoint.open(newest("ckpt")).read_into({piece: tensor, ...})

A checkpoint *is* its `index.json`. That file is written last and appears whole or not at all, so a directory without
it is torn or foreign, and never taken. A step that is saved again gets new shard files under new names; putting the
new index in place of the old one is one rename, or one PUT.

Rule of this file: no pickle, and no byte counts as loaded before its hash was verified. Boxes are intersected at load
instead of converted after the save: ByteCheckpoint (NSDI 2025).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fault_tolerance.checkpoints.buffers import Array, array_view, item_bytes
from fault_tolerance.checkpoints.index import Index, ShardEntry, check_tiling, dump, load
from fault_tolerance.checkpoints.loading import Target, load_group
from fault_tolerance.checkpoints.reads import groups, needed_bytes, plan_reads
from fault_tolerance.checkpoints.storage import Storage, StorageError, open_storage
from fault_tolerance.checkpoints.verify import Damage, DamageError, verify_shard
from fault_tolerance.digest import StateHasher
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box

INDEX = "index.json"


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What a load cost: bytes that the pieces have, bytes read for them (hashes included), requests made."""

    bytes_needed: int
    bytes_read: int
    requests: int


def commit(
    directory: str, entries: Iterable[ShardEntry], *, specs: Sequence[TensorSpec], extra: Mapping[str, Any]
) -> Checkpoint:
    """Make a checkpoint visible; the second phase of a save.

    `extra` is all other state, as JSON: its `step`, and what else a run needs to go on; `saved_at` is added.

    Raises ValueError if the pieces do not tile the state, StorageError if a shard is not there as it was written.
    A checkpoint that this directory already held is replaced in one instant; its files are removed after that.
    """
    shards = tuple(sorted(entries, key=lambda entry: entry.file))
    if not isinstance(extra.get("step"), int):
        raise ValueError(f"commit: extra.step must be the number of steps taken, got {extra.get('step')!r}")
    check_tiling(specs, shards)
    storage = open_storage(directory)
    sizes = storage.sizes()
    for shard in shards:
        _check_present(directory, shard, sizes)
    index = Index(tuple(specs), shards, {"saved_at": time.time(), **extra})
    text = np.frombuffer(dump(index).encode(), np.uint8)
    storage.write(INDEX, lambda: [text])
    storage.remove(set(sizes) - {INDEX} - {shard.file for shard in shards})
    return Checkpoint(directory, index, storage)


class Checkpoint:
    """A committed checkpoint, open for reading. Several threads may use it."""

    def __init__(self, path: str, index: Index, storage: Storage) -> None:
        self.path = path
        self.index = index
        self._storage = storage

    @staticmethod
    def open(path: str) -> Checkpoint:
        """Open a directory or URL. Raises StorageError if no checkpoint is there, ValueError if its index is damaged."""
        storage = open_storage(path)
        text = storage.read(INDEX).decode(errors="replace")
        return Checkpoint(str(path), load(text, where=f"{path}/{INDEX}"), storage)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The logical tensors."""
        return self.index.specs

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The logical tensors as wanted boxes: all of the state."""
        return tuple(Piece(spec.name, Box.whole(spec.shape)) for spec in self.specs)

    @property
    def extra(self) -> dict[str, Any]:
        """All other state: step, data cursor, config, versions, layout, ..."""
        return self.index.extra

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.extra["step"])

    def read_into(self, wanted: Mapping[Piece, Any], *, threads: int | None = None) -> ReadStats:
        """Fill every buffer (torch tensor, numpy array, memoryview; contiguous, of the stored dtype) with its piece.

        Reads only the units that the boxes touch, and verifies each. Raises DamageError, StorageError, and
        ValueError for a piece that is not in the checkpoint or a buffer that does not fit; buffers are then undefined.
        """
        reads = plan_reads(self.index, wanted)
        targets = {
            piece: Target(array_view(buffer, self.index.by_name[piece.tensor].dtype, piece.box.shape, where=f"load {piece}"))
            for piece, buffer in wanted.items()
        }
        workers = threads if threads is not None else min(4, os.cpu_count() or 1) if self._storage.local else 16
        with ThreadPoolExecutor(workers) as pool:
            loads = list(pool.map(lambda group: load_group(self._storage, group, targets), groups(reads)))
        damages = [damage for load in loads for damage in load.damages]
        if damages:
            raise DamageError(damages)
        requests = sum(load.requests for load in loads)
        return ReadStats(needed_bytes(self.index, wanted), sum(load.bytes_read for load in loads), requests)

    def read_tensor(self, name: str) -> Array:
        """A whole logical tensor; bfloat16 comes as uint16, which is as wide. Raises as `read_into` does."""
        spec = self.index.by_name.get(name)
        if spec is None:
            raise ValueError(f"checkpoint {self.path}: holds no tensor {name!r}; see `holdfast checkpoint show`")
        out = np.empty(spec.shape, f"u{item_bytes(spec.dtype)}")
        self.read_into({Piece(name, Box.whole(spec.shape)): out})
        return out if spec.dtype == "bfloat16" else out.view(spec.dtype)

    def state_sha256(self, *, progress: Callable[[int], None] = lambda _: None) -> str:
        """The digest of the logical state, independent of layout; reads one tensor at a time."""
        hasher = StateHasher()
        for spec in sorted(self.specs, key=lambda spec: spec.name):
            values = self.read_tensor(spec.name)
            hasher.begin(spec.name, spec.shape)
            hasher.update(values)
            progress(values.nbytes)
        return hasher.finish(self.step)

    def verify(self, *, progress: Callable[[int], None] = lambda _: None) -> list[Damage]:
        """Re-hash every byte of every file; returns what is wrong. `progress` is told of bytes as they are done."""
        sizes = self._storage.sizes()
        shards = self.index.shards
        return [d for shard in shards for d in verify_shard(self._storage, self.index, shard, sizes, progress)]

    def close(self) -> None:
        """End of use. Files are opened for a read and closed after it, so nothing is held, and nothing breaks."""


def _check_present(directory: str, shard: ShardEntry, sizes: Mapping[str, int]) -> None:
    if sizes.get(shard.file) != shard.num_bytes:
        raise StorageError(
            f"{directory}/{shard.file}: must have {shard.num_bytes} bytes here, got {sizes.get(shard.file)}; "
            "all nodes must write to one storage that each of them sees"
        )
