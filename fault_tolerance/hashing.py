"""Hashing: xxh3 of many units at once, by `hashing.c` where it is built, else one by one by the library `xxhash`.

    units of 4 KiB, one core     xxhash, a call each    about 6 GB/s, and the GIL is held
                                 hashing.c              about 18 GB/s, and it is not

The kernel is believed only after it has reproduced the library's numbers once in this process.

Rule of this file: it hashes. What is a unit, and what its hash must be, it does not know.
"""

from __future__ import annotations

import ctypes
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from parallel.native import TakenUp, c_library

SHORT = 240  # bytes, up to which the kernel leaves a unit to the library
HASHING = c_library(Path(__file__).with_name("hashing.c"), "fault_tolerance.hashing")

Words = NDArray[np.uint64]


def unit_hashes(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Words:
    """xxh3_64 of the units of the data, which starts at the first offset and ends at the last."""
    kernel = fast()
    return reference(data, offsets) if kernel is None else kernel(data, offsets)


def reference(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Words:
    """`unit_hashes` by the library."""
    view, edges = data.data, (offsets - offsets[0]).tolist()
    return np.array([xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(edges)], np.uint64)


class Kernel:
    """One loaded library."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError if it is not there or not ours."""
        self._hashes = ctypes.CDLL(str(path)).holdfast_hashes
        self._hashes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._hashes.restype = ctypes.c_int64

    def __call__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Words:
        """As `unit_hashes`."""
        out = np.empty(len(offsets) - 1, np.uint64)
        if data.nbytes != offsets[-1] - offsets[0] or not (data.flags.c_contiguous and offsets.flags.c_contiguous):
            raise ValueError(f"hashes: data must be dense and end where the offsets do, got {data.nbytes} bytes")
        if self._hashes(_address(data), _address(offsets), len(out), _address(out)):
            sizes, first = np.diff(offsets), offsets[0]
            for i in np.flatnonzero(sizes <= SHORT).tolist():
                out[i] = xxhash.xxh3_64_intdigest(data[offsets[i] - first : offsets[i + 1] - first].data)
        return out


def believed(path: Path) -> Kernel | None:
    """A library, if it can be loaded and computes what `xxhash` does."""
    try:
        kernel = Kernel(path)
    except (OSError, AttributeError):
        return None
    sizes = [*range(260), *range(500, 1200, 7), 4096, 65_537]
    offsets = np.cumsum([3, *sizes], dtype=np.int64)
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    return kernel if np.array_equal(kernel(data, offsets), reference(data, offsets)) else None


fast = TakenUp(HASHING, believed)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


if __name__ == "__main__":
    sys.exit(HASHING.main(without="hashes are made one by one"))
