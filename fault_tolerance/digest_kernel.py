"""Digest kernel: `digest.c`, compiled once per machine in half a second, and loaded by ctypes, which releases the GIL.

    digest.py   the definition, in numpy    about 1 GB/s of float32
    digest.c    the same number             about 9 GB/s, for boxes in any strides whose elements are aligned

A vault has it built beside itself and takes it up when it is there; a machine without a C compiler keeps to numpy. The
compiled file has a version for each kind of CPU and chooses when it is loaded, so machines may share a cache.

Rule of this file: it loads and calls. Whether the library is to be believed, `digest.py` says.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from parallel.native import c_library

SOURCE = Path(__file__).with_name("digest.c")


class Kernel:
    """One loaded library."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError if it is not there or not ours."""
        self._digest = ctypes.CDLL(str(path)).holdfast_digest
        self._digest.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 4]
        self._digest.restype = ctypes.c_uint64

    def __call__(self, bits: NDArray[Any], seeds: Sequence[int], start: Sequence[int]) -> int:
        """The share of a box that begins at `start`; `seeds` has one for each dimension, of which there is one at least."""
        places, words = ctypes.c_int64 * bits.ndim, ctypes.c_uint64 * bits.ndim
        box = places(*bits.shape), places(*bits.strides), places(*start), words(*seeds)
        return int(self._digest(bits.__array_interface__["data"][0], bits.itemsize, bits.ndim, *box))


DIGEST = c_library(SOURCE, "fault_tolerance.digest_kernel")


if __name__ == "__main__":
    sys.exit(DIGEST.main(without="digests are made by numpy"))
