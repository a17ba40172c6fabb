"""Units: how a stored piece is cut, so that another layout reads little more than it needs, and verifies all it reads.

    a piece of w2 (rows x columns; tp cuts columns)

        0    1/4  1/3  1/2            bands: each is an extent, contiguous in the file, and ends wherever a
        +-----+----+----+-----+       degree of tp would cut
        |     |    |    |     |
    1/4 +-----+----+----+-----+       units: the bytes under one hash. Rows, about 1/1024 of the extent, and a new
        +-----+----+----+-----+       unit starts wherever a degree of dp (or of tp and dp) would cut the tensor
    1/3 +-----+----+----+-----+
        |     |    |    |     |

A rank of a layout with the degrees below finds its rows and columns to be whole units; one with another degree, such
as dp 11, reads a unit too much at each end. Parts under 2 KiB are not worth a hash of their own (a norm is one unit),
and parts of a tensor under 64 KiB not a band. So what is read, hashes included, is within 2% of what is needed, for
models large enough that it matters.

Rule of this file: pure, and part of the format: a change of it is a new version of the format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.buffers import item_bytes
from parallel.atlas import TensorSpec
from parallel.boxes import Box, chunk

MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_PER_EXTENT = 4 << 10, 1 << 20, 1024
BAND_DEGREES = (2, 3, 4, 6, 8, 16)
ROW_DEGREES = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
MIN_PART_BYTES, MIN_BAND_BYTES = 2 << 10, 64 << 10

Offsets = NDArray[np.int64]


def bands(spec: TensorSpec, box: Box) -> list[Box]:
    """The boxes that a piece of a tensor is stored as, each contiguous."""
    dim = spec.tp_dim
    if not dim:  # not cut by tp, or cut along rows
        return [box]
    low, high = box.start[dim], box.stop[dim]
    most = math.prod(spec.shape) * item_bytes(spec.dtype) // MIN_BAND_BYTES
    inside = (edge for edge in _cuts(spec.shape[dim], [d for d in BAND_DEGREES if d <= most]) if low < edge < high)
    edges = [low, *inside, high]
    return [box.cut(dim, a - low, b - low) for a, b in pairwise(edges)]


def unit_offsets(spec: TensorSpec, box: Box) -> Offsets:
    """Where the units of an extent start, in bytes from its own start, and at last where it ends."""
    return _offsets(spec.shape, spec.tp_dim, box, item_bytes(spec.dtype))


@lru_cache(maxsize=1 << 14)
def _offsets(shape: tuple[int, ...], tp_dim: int | None, box: Box, width: int) -> Offsets:
    row = width * math.prod(box.shape[1:])
    if not shape:
        return np.array([0, width])
    low, high = box.start[0], box.stop[0]
    most = width * math.prod(shape) // MIN_PART_BYTES
    inside = (edge for edge in _row_cuts(shape[0], tp_dim, most) if low < edge < high)
    edges = [row * (edge - low) for edge in (low, *inside, high)]
    unit = _unit_bytes(box, width)
    sections = [np.arange(a, b, unit) for a, b in pairwise(edges)]
    offsets = np.concatenate([*sections, edges[-1:]])
    offsets.flags.writeable = False
    return offsets


def _unit_bytes(box: Box, width: int) -> int:
    """The largest unit: whole rows, or a whole part of one row."""
    target = min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, -(-box.size * width // UNITS_PER_EXTENT)))
    row = width * math.prod(box.shape[1:])
    if row <= target:
        return target // row * row
    parts = row // target
    while row % (parts * width):  # ends at 1 at the latest
        parts -= 1
    return row // parts


@lru_cache(maxsize=1 << 10)
def _row_cuts(size: int, tp_dim: int | None, most: int) -> tuple[int, ...]:
    """Rows where dp would cut the tensor, alone or after tp did, into `most` parts at most."""
    edges = set(_cuts(size, [d for d in ROW_DEGREES if d <= most]))
    if tp_dim == 0:
        for degree in BAND_DEGREES:
            nested = [d for d in ROW_DEGREES if d * degree <= min(most, ROW_DEGREES[-1])]
            for part in range(degree if nested else 0):
                start, stop = chunk(size, degree, part)
                edges.update(start + edge for edge in _cuts(stop - start, nested))
    return tuple(sorted(edges))


def _cuts(size: int, degrees: Sequence[int]) -> list[int]:
    """The inner edges of `size` cut into equal parts, for every one of these degrees."""
    edges = {chunk(size, degree, part)[1] for degree in degrees for part in range(degree)}
    return sorted(edge for edge in edges if 0 < edge < size)
