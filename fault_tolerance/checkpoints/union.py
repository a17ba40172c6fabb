"""Union: tensors of another program's ranks into logical ones, and back, as its pattern table says.

    ranks' tensors --gather--> logical tensor --scatter--> a rank's tensor

Copies are not taken on trust: replicated ones must be equal bit by bit, averaged ones are averaged in float64, and
every element of the logical tensor must come from somewhere.

Rule of this file: numpy arrays in and out; the geometry is that of `patterns.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.checkpoints.patterns import Op, Seat, place


def gather(
    ops: Sequence[Op], shape: Sequence[int], parts: Iterable[tuple[Seat, NDArray[Any]]], *, name: str
) -> NDArray[Any]:
    """The logical tensor out of what ranks hold of it.

    Raises ValueError when a part has not the shape that the rules give it, when replicated copies differ, or when
    elements are missing.
    """
    listed = list(parts)
    if not listed:
        raise ValueError(f"gather: {name} must be held by some rank, got none")
    total = np.zeros(tuple(shape), np.float64)
    out = np.zeros(tuple(shape), listed[0][1].dtype)
    count = np.zeros(tuple(shape), np.int64)
    for seat, part in listed:
        placement = place(ops, shape, seat)
        if part.shape != placement.shape:
            raise ValueError(
                f"gather: {name} must have shape {placement.shape} on {seat}, got {part.shape}; see its rule"
            )
        for move in placement.moves:
            target = tuple(slice(a, b) for a, b in zip(move.logical.start, move.logical.stop, strict=True))
            source = tuple(slice(a, b) for a, b in zip(move.physical.start, move.physical.stop, strict=True))
            values = part[source].reshape(move.logical.shape)
            again = count[target] > 0
            if placement.copies != "mean" and (again & (_bits(values) != _bits(out[target]))).any():
                raise ValueError(f"gather: copies of {name} must be equal, but differ on {seat}; a rank went astray")
            out[target] = values
            total[target] += values
            count[target] += 1
    if not count.all():
        raise ValueError(f"gather: {name} lacks {int((count == 0).sum())} of {count.size} elements; is a rank missing?")
    averaged = any(op.name == "average" for op in ops)
    return np.asarray(total / count, out.dtype) if averaged else out


def scatter(ops: Sequence[Op], logical: NDArray[Any], seat: Seat) -> NDArray[Any]:
    """A rank's tensor; padding is zero. Raises ValueError if the rules do not fit the shape."""
    placement = place(ops, logical.shape, seat)
    out = np.zeros(placement.shape, logical.dtype)
    for move in placement.moves:
        source = tuple(slice(a, b) for a, b in zip(move.logical.start, move.logical.stop, strict=True))
        target = tuple(slice(a, b) for a, b in zip(move.physical.start, move.physical.stop, strict=True))
        out[target] = logical[source].reshape(move.physical.shape)
    return out


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
