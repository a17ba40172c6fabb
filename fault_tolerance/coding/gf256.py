"""GF(2^8): the field and the matrices of the erasure code, and its arithmetic in plain numpy.

    parity = C . data       C[i][j] = (x_0 + y_j) / (x_i + y_j),  x_i = k + i,  y_j = j

`C` is a Cauchy matrix whose columns are scaled so that its first row is all ones. Scaling a column by a unit keeps
every square submatrix invertible, so any k of the k + m blocks give all of them back, and the first parity is a
plain XOR: the m = 1 case, and the cheapest repair, need no multiplication.

Every host computes this matrix by itself and all kernels get the same one, so the bytes do not depend on the CPU or
on the version of a library. `combine` is the kernel for hosts without ISA-L. It multiplies by Horner's rule on whole
words (shift, reduce what fell out, add): numpy has no byte shuffle, its table look-ups (`take`) widen every byte to an
eight-byte index, and they cost m * k passes where this costs 7 * m of shifting and 4 * m * k plain XORs, on average.

Rule of this file: numpy only, no library to load, no processes.
Source: Bloemer et al., "An XOR-based erasure-resilient coding scheme", ICSI TR-95-048 (1995), for Cauchy codes; the
polynomial 0x11d is that of ISA-L and of RAID-6 (Anvin, "The mathematics of RAID-6").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

POLYNOMIAL = 0x11D
MAX_BLOCKS = 255
_SLICE_BYTES = 1 << 15  # scratch and one slice of each source stay in the first two cache levels


def _tables() -> tuple[Bytes, Bytes]:
    exp, log = np.zeros(510, np.uint8), np.zeros(256, np.int64)
    value = 1
    for power in range(255):
        exp[power] = exp[power + 255] = value
        log[value] = power
        value = (value << 1) ^ (POLYNOMIAL if value & 0x80 else 0)
    mul = exp[log[:, None] + log[None, :]]
    mul[0, :] = mul[:, 0] = 0
    inv = exp[255 - log]
    inv[0] = 0
    return mul, inv


MUL, INV = _tables()  # MUL[a, b] = a * b; INV[a] = 1 / a, and INV[0] = 0 by convention


def generator(k: int, m: int) -> Bytes:
    """The (m, k) parity matrix. Raises ValueError unless k >= 1, m >= 0 and k + m <= 255."""
    if k < 1 or m < 0 or k + m > MAX_BLOCKS:
        raise ValueError(
            f"generator: k >= 1, m >= 0 and k + m <= {MAX_BLOCKS} must hold, got k={k}, m={m}; use smaller groups"
        )
    y = np.arange(k)
    x = np.arange(k, k + m)[:, None]
    matrix: Bytes = MUL[INV[x ^ y], k ^ y]
    return matrix


def matmul(a: Bytes, b: Bytes) -> Bytes:
    """The product of two small matrices."""
    product: Bytes = np.bitwise_xor.reduce(MUL[a[:, :, None], b[None, :, :]], axis=1)
    return product


def inverse(matrix: Bytes) -> Bytes:
    """The inverse of a square matrix, by Gauss-Jordan. Raises ValueError if it is singular."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        candidates = np.flatnonzero(work[column:, column])
        if not len(candidates):
            raise ValueError("inverse: matrix must be invertible, got a singular one")
        pivot = column + int(candidates[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = MUL[INV[work[column, column]], work[column]]
        others = work[:, column].copy()
        others[column] = 0
        work ^= MUL[others[:, None], work[column][None, :]]
    return work[:, size:]


def recovery(k: int, m: int, present: Sequence[int], wanted: Sequence[int]) -> tuple[tuple[int, ...], Bytes]:
    """(sources, matrix): which k of the `present` blocks to read, and the (wanted, k) matrix that makes the wanted.

    Data blocks are preferred as sources, then the lowest parities, so that one lost data block is a plain XOR. Only
    a matrix as large as the number of lost data blocks is inverted. Raises ValueError with fewer than k present.
    """
    available = sorted(set(present))
    if len(available) < k:
        lost = sorted(set(range(k + m)) - set(available))
        raise ValueError(
            f"decode: at least {k} of {k + m} blocks must be present, got {len(available)}; blocks {lost} are lost"
        )
    sources = tuple(available[:k])
    parity_rows = generator(k, m)
    kept = [b for b in sources if b < k]
    used = [b - k for b in sources if b >= k]
    missing = [j for j in range(k) if j not in set(kept)]
    data = np.zeros((k, k), np.uint8)  # data[j] = block j as a combination of the sources
    data[kept, np.arange(len(kept))] = 1
    if missing:
        known = np.concatenate([parity_rows[np.ix_(used, kept)], np.eye(len(used), dtype=np.uint8)], axis=1)
        data[missing] = matmul(inverse(parity_rows[np.ix_(used, missing)]), known)
    rows = [data[w] if w < k else matmul(parity_rows[[w - k]], data)[0] for w in wanted]
    return sources, np.array(rows, np.uint8).reshape(len(wanted), k)


def combine(matrix: Bytes, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
    """outputs[i] = sum over j of matrix[i, j] * sources[j], for flat byte arrays of one length."""
    length = len(outputs[0]) if len(outputs) else 0
    scratch = [np.empty(_SLICE_BYTES // 8, np.uint64) for _ in range(2)]
    for start in range(0, length, _SLICE_BYTES):
        cut = slice(start, min(start + _SLICE_BYTES, length))
        parts = [source[cut] for source in sources]
        for row, output in zip(matrix, outputs, strict=True):
            _row(row, parts, output[cut], scratch[0], scratch[1])


def _row(row: Bytes, parts: Sequence[Bytes], output: Bytes, total: NDArray[Any], spare: NDArray[Any]) -> None:
    """One output slice, from the highest bit of the coefficients down: total = total * x + (sources with the bit)."""
    words = -(-len(output) // 8)
    total, spare = total[:words], spare[:words]
    total[:] = 0
    low = total.view(np.uint8)[: len(output)]
    highest = int(np.bitwise_or.reduce(row)).bit_length()
    for bit in reversed(range(highest)):
        if bit != highest - 1:
            _times_x(total, spare)
        for j in np.flatnonzero(row & (1 << bit)):
            np.bitwise_xor(low, parts[int(j)], out=low)
    np.copyto(output, low)


def _times_x(total: NDArray[Any], spare: NDArray[Any]) -> None:
    """Every byte of `total` times x: shift left by one and reduce those whose highest bit fell out."""
    np.right_shift(total, np.uint64(7), out=spare)
    np.bitwise_and(spare, np.uint64(0x0101010101010101), out=spare)
    np.multiply(spare, np.uint64(POLYNOMIAL & 0xFF), out=spare)
    np.left_shift(total, np.uint64(1), out=total)
    np.bitwise_and(total, np.uint64(0xFEFEFEFEFEFEFEFE), out=total)
    np.bitwise_xor(total, spare, out=total)
