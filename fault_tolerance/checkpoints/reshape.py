"""Reshape: the same checkpoint in other files, as the ranks of another layout would have written it.

No load needs this. It is for handing a checkpoint to a place that likes few large files, or many small ones.

Rule of this file: the logical state is untouched; every byte passes its hash on the way in and gets one on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fault_tolerance.checkpoints.buffers import Array, item_bytes
from fault_tolerance.checkpoints.checkpoint import Checkpoint, commit
from fault_tolerance.checkpoints.shard import write_shard
from parallel.atlas import Atlas, Piece, TensorSpec
from parallel.boxes import Box, even
from parallel.layout import Layout


def pieces_of_layout(specs: Sequence[TensorSpec], layout: Layout, schedule: str) -> list[list[Piece]]:
    """What each rank of a layout would write. Raises ValueError if the model is not known well enough to be cut."""
    if not all(spec.units for spec in specs):
        raise ValueError(
            "reshape: layout must be left out for an imported model, whose layers are unknown; use files=N"
        )
    num_layers = max(unit for spec in specs for unit in spec.units) - 1
    atlas = Atlas(tuple(specs), layout, schedule, num_layers)
    return [list(atlas.owned(rank)) for rank in range(layout.world)]


def pieces_of_files(specs: Sequence[TensorSpec], num_files: int) -> list[list[Piece]]:
    """Every tensor's rows, split evenly over `num_files` files. Raises ValueError unless there is one at least."""
    if num_files < 1:
        raise ValueError(f"reshape: files must be at least 1, got {num_files}")
    return [list(_shares(specs, num_files, index)) for index in range(num_files)]


def reshape(
    source: Checkpoint,
    directory: str,
    pieces: Sequence[Sequence[Piece]],
    *,
    layout: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Checkpoint:
    """Write the source's state again, one file for each group of pieces. Every byte read is verified.

    Raises DamageError if the source is damaged, StorageError as `write_shard` does.
    """

    def reader(piece: Piece) -> Callable[[], Array]:
        def read() -> Array:
            out = np.empty(piece.box.shape, f"u{item_bytes(source.index.by_name[piece.tensor].dtype)}")
            source.read_into({piece: out})
            progress(out.nbytes)
            return out

        return read

    entries = [
        write_shard(directory, f"part{number:05d}", [(p, reader(p)) for p in own], specs=source.specs)
        for number, own in enumerate(pieces)
    ]
    extra: dict[str, Any] = source.extra | ({"layout": layout} if layout is not None else {})
    return commit(directory, entries, specs=source.specs, extra=extra)


def _shares(specs: Sequence[TensorSpec], parts: int, index: int) -> Iterator[Piece]:
    for spec in specs:
        box = Box.whole(spec.shape)
        if spec.shape:
            box = box.cut(0, *even(spec.shape[0], parts, index))
        elif index:
            continue
        if box.size:
            yield Piece(spec.name, box)
