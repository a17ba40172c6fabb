"""Units: how a stored piece is cut, so that another layout reads little more than it needs, and verifies all it reads.

    a piece of w2 (rows x columns; tp cuts columns)

        0    1/4  1/3  1/2            bands: each is contiguous in the file, one follows the other, and one ends
        +-----+----+----+-----+       wherever a degree of tp would cut
        |     |    |    |     |
    1/4 +-----+----+----+-----+       units: the bytes under one hash. Rows, about 1/1024 of the band, and a new
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
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.checkpoints.buffers import item_bytes
from parallel.atlas import TensorSpec
from parallel.boxes import Box, chunk

MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_PER_BAND = 4 << 10, 1 << 20, 1024
BAND_DEGREES = (2, 3, 4, 6, 8, 16)
ROW_DEGREES = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
MIN_PART_BYTES, MIN_BAND_BYTES = 2 << 10, 64 << 10

Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a piece lies in a file: band after band, unit after unit. Bytes count from where the piece begins.

    Band i is `bands[i]`, begins at byte `starts[i]` and has the units from `firsts[i]` on; both lists end with the end.
    """

    bands: tuple[Box, ...]
    starts: tuple[int, ...]
    firsts: tuple[int, ...]
    offsets: Offsets

    @property
    def num_units(self) -> int:
        """Units, and so hashes, in all."""
        return self.firsts[-1]


def cut(spec: TensorSpec, box: Box) -> Cut:
    """How the piece `box` of a tensor is stored."""
    return _cut(spec.shape, spec.tp_dim, box, item_bytes(spec.dtype))


@lru_cache(maxsize=1 << 12)
def _cut(shape: tuple[int, ...], tp_dim: int | None, box: Box, width: int) -> Cut:
    """Layers are alike, and so are a parameter and its moments: what is asked for has mostly been asked for before."""
    bands = tuple(_bands(shape, tp_dim, box, width))
    starts, firsts, parts = [0], [0], []
    for band in bands:
        inner = math.prod(band.shape[1:]) * width
        rows = (band.start[0], band.stop[0]) if shape else (0, 1)
        offsets = _offsets(shape[0] if shape else 1, math.prod(shape) * width, tp_dim, rows, inner, width)
        parts.append(offsets[:-1] + starts[-1])
        starts.append(starts[-1] + int(offsets[-1]))
        firsts.append(firsts[-1] + len(offsets) - 1)
    joined = np.concatenate([*parts, starts[-1:]]).astype(np.int64, copy=False)
    joined.flags.writeable = False
    return Cut(bands, tuple(starts), tuple(firsts), joined)


def _bands(shape: tuple[int, ...], tp_dim: int | None, box: Box, width: int) -> list[Box]:
    """The boxes that a piece of a tensor is stored as, each contiguous."""
    if not tp_dim:  # not cut by tp, or cut along rows
        return [box]
    low, high = box.start[tp_dim], box.stop[tp_dim]
    most = math.prod(shape) * width // MIN_BAND_BYTES
    inside = (edge for edge in _cuts(shape[tp_dim], [d for d in BAND_DEGREES if d <= most]) if low < edge < high)
    return [box.cut(tp_dim, a - low, b - low) for a, b in pairwise([low, *inside, high])]


@lru_cache(maxsize=1 << 12)
def _offsets(num_rows: int, tensor_bytes: int, tp_dim: int | None, rows: tuple[int, int], row: int, width: int) -> Offsets:
    """Where the units of a band start, and at last where it ends: rows [low, high) of a tensor, of `row` bytes in the band."""
    low, high = rows
    inside = (edge for edge in _row_cuts(num_rows, tp_dim, tensor_bytes // MIN_PART_BYTES) if low < edge < high)
    edges = [row * (edge - low) for edge in (low, *inside, high)]
    unit = _unit_bytes(row * (high - low), row, width)
    return np.concatenate([*(np.arange(a, b, unit) for a, b in pairwise(edges)), edges[-1:]])


def _unit_bytes(size: int, row: int, width: int) -> int:
    """The largest unit of a band: whole rows, or a whole part of one row."""
    target = min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, -(-size // UNITS_PER_BAND)))
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
