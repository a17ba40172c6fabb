"""Reader: fills a rank's tensors from a snapshot, whatever the layout that made it.

How to use it, with `snapshot = catalogue(inventories, run=run).newest` (it travels as `to_json`):

    reader = Reader(snapshot, node=my_node, secret=secret)
    stats = reader.restore(engine.atlas, rank, engine.state())     # local, peer and decoded bytes, seconds
    part = share(engine.atlas, rank, engine.state())               # this rank's
    ...  sum of all ranks' parts mod 2^64 must equal snapshot.digest
    engine.loaded(snapshot.step); reader.close()

Only the chunks that hold wanted bytes are read, each is hashed before it is used, and what is lost or damaged is
decoded. Several threads work at once; each has at most one batch (`moves.py`) in memory.

Rule of this file: it writes into the given tensors and nowhere else. Raises RestoreError if the snapshot cannot give
what is wanted; then the tensors hold anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fault_tolerance.digest import combine, digest
from fault_tolerance.snapshots.blocks import Blocks, RestoreError
from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.moves import Batch, Move, batches, moves_for
from fault_tolerance.snapshots.slab import item_bytes
from fault_tolerance.snapshots.snapshot import carrier
from parallel.atlas import Atlas, Piece

__all__ = ["Reader", "RestoreError", "RestoreStats", "share"]

THREADS = 4


@dataclass(frozen=True, slots=True)
class RestoreStats:
    """What a restore of one rank cost: bytes by source, damaged chunks that were decoded around, seconds."""

    local_bytes: int
    peer_bytes: int
    decoded_bytes: int
    fetched_bytes: int
    bad_chunks: int
    seconds: float

    @property
    def tier(self) -> str:
        """The farthest source that was needed: `local`, `peer_memory` or `parity`."""
        return "parity" if self.decoded_bytes else "peer_memory" if self.peer_bytes else "local"


class Reader:
    """Reads one snapshot for one rank."""

    def __init__(self, snapshot: Snapshot, *, node: str, secret: bytes, threads: int = THREADS) -> None:
        """`node` is the one that this process runs on."""
        self.snapshot, self._threads = snapshot, threads
        self._blocks = Blocks(snapshot, node=node, run=snapshot.plan.run, secret=secret)
        self._prepared = False

    def restore(self, atlas: Atlas, rank: int, tensors: Mapping[Piece, torch.Tensor]) -> RestoreStats:
        """Fill every box that `rank` holds under `atlas`; `tensors` by piece, of the boxes' shapes.

        Raises RestoreError, and ValueError if the snapshot is of another model.
        """
        began = time.monotonic()
        if not self._prepared:
            self._blocks.prepare()
            self._prepared = True
        work = batches(self.snapshot.plan, moves_for(self.snapshot.plan, atlas, rank))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="restore") as pool:
            for _ in pool.map(lambda batch: self._do(batch, tensors), work):
                pass
        counts = self._blocks.counts
        return RestoreStats(
            local_bytes=counts.local,
            peer_bytes=counts.peer,
            decoded_bytes=counts.decoded,
            fetched_bytes=counts.fetched,
            bad_chunks=counts.bad_chunks,
            seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """End all connections."""
        self._blocks.close()

    def _do(self, batch: Batch, tensors: Mapping[Piece, torch.Tensor]) -> None:
        parts = [(first, self._blocks.range(batch.node, first, last)) for first, last in batch.ranges]
        for move in batch.moves:
            first, part = next((at, part) for at, part in reversed(parts) if at <= move.first)
            _copy(move, part, first, tensors[Piece(move.tensor, move.target)])


def share(atlas: Atlas, rank: int, tensors: Mapping[Piece, torch.Tensor], *, threads: int = THREADS) -> int:
    """A rank's part of the digest of the logical state: over what it owns, so that each element counts once."""

    def of(owned: tuple[Piece, Piece]) -> int:
        piece, home = owned
        array = carrier(tensors[home])[piece.box.within(home.box)].cpu().numpy()
        return digest(array, name=piece.tensor, box=piece.box)

    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        return reduce(combine, pool.map(of, atlas.shares(rank)), 0)


def _copy(move: Move, part: NDArray[np.uint8], at: int, target: torch.Tensor) -> None:
    """Copy a move's overlap out of `part`, whose first byte is byte `at` of the node."""
    width = item_bytes(move.dtype)
    carried = carrier(target)
    window = _window(move, part, at, width)
    into = carried[move.overlap.within(move.target)] if move.overlap.shape else carried
    if target.is_cuda:
        into.copy_(torch.from_numpy(np.array(window.view(_signed(width)))))
    else:
        np.copyto(into.numpy(), window.view(_signed(width)))


def _window(move: Move, part: NDArray[np.uint8], at: int, width: int) -> NDArray[Any]:
    """The overlap's elements, as a strided view of the bytes that were read."""
    shape = move.source.shape
    if not shape:
        return part[move.first - at : move.last - at].view(f"u{width}").reshape(())
    strides = np.cumprod([width, *reversed(shape[1:])], dtype=np.int64)[::-1]
    flat = part[move.first - at : move.last - at].view(f"u{width}")
    return np.lib.stride_tricks.as_strided(flat, move.overlap.shape, [int(s) for s in strides], writeable=False)


def _signed(width: int) -> str:
    return "u1" if width == 1 else f"i{width}"
