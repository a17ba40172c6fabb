"""Codec: k data blocks and m parity blocks, any m of which may be lost.

    data 0 .. k-1  --encode-->  parity k .. k+m-1          any k of them  --decode-->  the blocks that are wanted

Systematic Reed-Solomon over GF(2^8) (the matrix is in `gf256.py`); m = 1 is XOR, and k = 1 is replication. Buffers
are anything with the buffer protocol, of any length and alignment; nothing is copied, and the GIL is released while
the bytes are worked on. The code finds *lost* blocks, not *wrong* ones: a block whose hash (`crc32c`) fails must be
left out by the caller, and then counts as lost.

`HOLDFAST_CODEC=numpy` or `isa-l` forces a backend; both give the same bytes.

Rule of this file: checks of the caller's buffers and choice of the kernel; no arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.coding import crc, gf256, isal
from fault_tolerance.coding.gf256 import Bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

    BytesLike: TypeAlias = Buffer | NDArray[Any]  # numpy's stubs know the buffer protocol from Python 3.12 on

FORCE = "HOLDFAST_CODEC"
BACKENDS = ("isa-l", "numpy")


class Codec:
    """The code for one (k, m). Cheap to make; may be used by several threads at once."""

    def __init__(self, k: int, m: int, *, backend: str | None = None) -> None:
        """Raises ValueError unless k >= 1, m >= 0, k + m <= 255, and if a forced backend is unknown or not here."""
        self.k, self.m = k, m
        self._matrix = gf256.generator(k, m)
        self.backend, self.reason = choose(backend)
        self._combine = _kernel(self.backend).combine

    def __repr__(self) -> str:
        return f"Codec(k={self.k}, m={self.m}, backend={self.backend!r})"

    def encode(self, data: Sequence[BytesLike], parity: Sequence[BytesLike]) -> None:
        """Fill the m `parity` buffers from the k `data` buffers, all of one length.

        Raises ValueError if their number or lengths are wrong, or a parity buffer is read-only.
        """
        if len(data) != self.k or len(parity) != self.m:
            raise ValueError(
                f"encode: {self.k} data and {self.m} parity buffers must be given, got {len(data)} and {len(parity)}"
            )
        sources, outputs = [as_bytes(b) for b in data], [as_bytes(b) for b in parity]
        _check("encode", sources, outputs)
        self._combine(self._matrix, sources, outputs)

    def decode(self, present: Mapping[int, BytesLike], wanted: Mapping[int, BytesLike]) -> None:
        """Write the `wanted` blocks (data 0..k-1, parity k..k+m-1) into the given buffers, from any k `present` ones.

        Of more than k present blocks, data comes first, then the lowest parities. Raises ValueError if fewer than
        k are present (it says which are lost), an index is unknown, lengths differ or a wanted buffer is read-only.
        """
        unknown = [index for index in (*present, *wanted) if not 0 <= index < self.k + self.m]
        if unknown:
            raise ValueError(f"decode: block indices must be in 0..{self.k + self.m - 1}, got {unknown}")
        chosen, matrix = _recovery(self.k, self.m, tuple(present), tuple(wanted))
        sources, outputs = [as_bytes(present[i]) for i in chosen], [as_bytes(b) for b in wanted.values()]
        _check("decode", sources, outputs)
        self._combine(matrix, sources, outputs)


def crc32c(buffer: BytesLike, seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of a buffer; `seed` is the checksum of what came before, so pieces can be chained."""
    return int(_crc_kernel(choose()[0]).crc32c(as_bytes(buffer), seed))


def choose(backend: str | None = None) -> tuple[str, str]:
    """(backend, reason) that a new codec uses. Raises ValueError if a forced one is unknown or not here."""
    forced = backend if backend is not None else os.environ.get(FORCE) or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"{FORCE}: must be one of {', '.join(BACKENDS)}, got {forced!r}; unset it to choose the best")
    if forced == "numpy":
        return "numpy", "forced"
    library, reason = isal.load()
    if library is None and forced is not None:
        raise ValueError(f"{FORCE}: isa-l must be usable here, got {reason}; install pyeclib or unset it")
    return ("isa-l" if library is not None else "numpy"), reason


def as_bytes(buffer: BytesLike) -> Bytes:
    """The same memory as a flat byte array. Raises ValueError if it is not contiguous."""
    view = memoryview(cast("Buffer", buffer))
    if not view.c_contiguous:
        raise ValueError(f"codec: a buffer must be contiguous, got shape {view.shape} with strides {view.strides}")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


@lru_cache(maxsize=1024)
def _recovery(k: int, m: int, present: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[tuple[int, ...], Bytes]:
    return gf256.recovery(k, m, present, wanted)


def _kernel(backend: str) -> isal.Isal | ModuleType:
    return _isal() if backend == "isa-l" else gf256


def _crc_kernel(backend: str) -> isal.Isal | ModuleType:
    return _isal() if backend == "isa-l" else crc


def _isal() -> isal.Isal:
    library, reason = isal.load()
    assert library is not None, reason
    return library


def _check(where: str, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
    lengths = sorted({len(array) for array in (*sources, *outputs)})
    if len(lengths) > 1:
        raise ValueError(f"{where}: all buffers must have one length, got {lengths}; pad blocks with zeros")
    if lengths != [0] and not all(array.flags.writeable for array in outputs):
        raise ValueError(f"{where}: buffers to be filled must be writable, got a read-only one")
