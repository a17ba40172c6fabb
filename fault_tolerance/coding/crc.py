"""CRC-32C (Castagnoli) in plain numpy, for hosts without ISA-L.

    the buffer as lanes      lane 0 | lane 1 | ... | lane n-1       one register per lane, advanced together
    then pairwise            crc(A + B) = shift(crc(A), length of B) ^ crc(B)

The register is linear over GF(2), so lanes that start from zero can be joined afterwards by shifting.

Rule of this file: bytes in, an integer out. Source: RFC 3720, appendix B.4 (test vectors); zlib's `crc32_combine`
for the idea of joining.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_REFLECTED = 0x82F63B78
_LANES = 1 << 10
_MASK = 0xFFFFFFFF

Words = NDArray[np.uint32]


def _advance_table(bits: int) -> Words:
    """What `bits` zero bits make of every register value below 2^bits."""
    table = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_REFLECTED), table >> 1).astype(np.uint32)
    return table


_BYTE, _PAIR = _advance_table(8), _advance_table(16)


def crc32c(data: NDArray[np.uint8], seed: int = 0) -> int:
    """The checksum of a flat byte array; `seed` is the checksum of what came before it."""
    register = seed ^ _MASK
    lane_bytes = len(data) // _LANES & ~1
    head = lane_bytes * _LANES
    if head:
        register = _shift(register, head) ^ _lanes(data[:head], lane_bytes)
    for byte in data[head:].tobytes():
        register = int(_BYTE[(register ^ byte) & 0xFF]) ^ register >> 8
    return register ^ _MASK


def _lanes(data: NDArray[np.uint8], lane_bytes: int) -> int:
    """The register after `data`, from zero."""
    columns = np.ascontiguousarray(data.reshape(_LANES, -1, 2).transpose(1, 0, 2)).view("<u2")[..., 0]
    registers = np.zeros(_LANES, np.uint32)
    for column in columns:
        registers = _PAIR[(registers ^ column) & 0xFFFF] ^ (registers >> 16)
    while len(registers) > 1:
        registers = _apply(_shift_matrix(lane_bytes), registers[0::2]) ^ registers[1::2]
        lane_bytes *= 2
    return int(registers[0])


def _shift(register: int, num_bytes: int) -> int:
    return int(_apply(_shift_matrix(num_bytes), np.array([register], np.uint32))[0])


def _apply(matrix: Words, registers: Words) -> Words:
    """matrix . register for each register; row b of `matrix` is what bit b becomes."""
    bits = (registers[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.asarray(np.bitwise_xor.reduce(bits * matrix[None, :], axis=1), np.uint32)


@lru_cache(maxsize=64)
def _shift_matrix(num_bytes: int) -> Words:
    """What `num_bytes` zero bytes make of each of the 32 bits of a register, by repeated squaring."""
    identity = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    if num_bytes == 0:
        return identity
    if num_bytes == 1:
        return np.asarray(_BYTE[identity & 0xFF] ^ (identity >> 8), np.uint32)
    half = _shift_matrix(num_bytes // 2)
    whole = _apply(half, half)
    return _apply(_shift_matrix(1), whole) if num_bytes % 2 else whole
