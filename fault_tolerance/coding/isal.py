"""The door to ISA-L: erasure coding and CRC-32C of a shared library, by ctypes, without copying.

    1. the library inside the pyeclib wheel      pyeclib.libs/libisal-pyeclib.so.2
    2. the system's                              libisal.so.2
    3. none: the caller uses numpy               gf256.py, crc.py

A library is believed only after it has reproduced numpy's bytes once in this process. The coefficient tables that it
derives from our matrix depend on CPU and version; they stay in this process.

ctypes releases the GIL during each call. Lengths are C ints, so longer buffers are cut here.

Rule of this file: addresses and lengths in, bytes out; it trusts its caller to have checked them.
Source: intel/isa-l 2.31, `include/erasure_code.h`, `raid.h` and `crc.h`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fault_tolerance.coding import crc, gf256
from fault_tolerance.coding.gf256 import Bytes

_CUT_BYTES = 1 << 30
_XOR_ALIGNMENT = 64  # xor_gen stores whole aligned vectors
_MASK = 0xFFFFFFFF


class Isal:
    """One loaded library."""

    name = "isa-l"

    def __init__(self, path: str) -> None:
        """Raises OSError or AttributeError if `path` is no ISA-L."""
        self.path = path
        library = ctypes.CDLL(path)
        self._init_tables = library.ec_init_tables
        self._encode = library.ec_encode_data
        self._xor = library.xor_gen
        self._crc = library.crc32_iscsi
        self._init_tables.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p]
        self._init_tables.restype = None
        self._encode.argtypes = [ctypes.c_int] * 3 + [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
        self._encode.restype = None
        self._xor.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        self._xor.restype = ctypes.c_int
        self._crc.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
        self._crc.restype = ctypes.c_uint
        self._tables = lru_cache(maxsize=256)(self._make_tables)

    def combine(self, matrix: Bytes, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
        """outputs[i] = sum over j of matrix[i, j] * sources[j], for flat byte arrays of one length."""
        if not outputs or not len(outputs[0]):
            return
        ins, outs = [_address(s) for s in sources], [_address(o) for o in outputs]
        plain_xor = len(outs) == 1 and len(ins) > 1 and bool((matrix == 1).all())
        if plain_xor and not any(address % _XOR_ALIGNMENT for address in (*ins, *outs)):
            self._combine_xor(ins + outs, len(outputs[0]))
        else:
            self._combine_tables(matrix, ins, outs, len(outputs[0]))

    def crc32c(self, data: Bytes, seed: int = 0) -> int:
        """The checksum of a flat byte array; `seed` is the checksum of what came before it."""
        register, address = seed ^ _MASK, _address(data)
        for start, length in _cuts(len(data)):
            register = self._crc(address + start, length, register)
        return int(register) ^ _MASK

    def _combine_xor(self, addresses: Sequence[int], total: int) -> None:
        for start, length in _cuts(total):
            if self._xor(len(addresses), length, _pointers(addresses, start)):
                raise RuntimeError(f"xor_gen: must accept {len(addresses)} vectors of {length} bytes, got an error")

    def _combine_tables(self, matrix: Bytes, ins: Sequence[int], outs: Sequence[int], total: int) -> None:
        tables = self._tables(len(ins), len(outs), matrix.tobytes())
        for start, length in _cuts(total):
            self._encode(length, len(ins), len(outs), tables, _pointers(ins, start), _pointers(outs, start))

    def _make_tables(self, k: int, rows: int, matrix: bytes) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(32 * k * rows)
        self._init_tables(k, rows, matrix, tables)
        return tables


@lru_cache(maxsize=1)
def load() -> tuple[Isal | None, str]:
    """The first library that works, and why it was chosen; None where there is none."""
    refused = []
    for path in _candidates():
        try:
            library = Isal(path)
        except (OSError, AttributeError) as error:
            refused.append(f"{path}: {error}")
            continue
        fault = self_test(library)
        if fault is None:
            return library, f"ISA-L from {path}"
        refused.append(f"{path}: {fault}")
    return None, "no usable ISA-L (" + ("; ".join(refused) or "neither in the pyeclib wheel nor on the system") + ")"


def self_test(library: Isal) -> str | None:
    """What the library does differently from numpy, or None."""
    random = np.random.default_rng(0)
    for k, m in ((1, 1), (4, 1), (5, 2), (10, 7)):
        for length in (1, 63, 64, 257, 4096):
            matrix = gf256.generator(k, m)
            store = random.integers(0, 256, (k, length + 1), np.uint8)
            sources = [row[k % 2 :][:length] for row in store]
            ours, theirs = ([np.empty(length, np.uint8) for _ in range(m)] for _ in range(2))
            gf256.combine(matrix, sources, ours)
            library.combine(matrix, sources, theirs)
            if not all(map(np.array_equal, ours, theirs)):
                return f"encodes k={k}, m={m}, length {length} differently from numpy"
    probe = random.integers(0, 256, 5000, np.uint8)
    return None if library.crc32c(probe, 7) == crc.crc32c(probe, 7) else "computes another CRC-32C than numpy"


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("pyeclib")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from map(str, sorted((Path(root).parent / "pyeclib.libs").glob("libisal-pyeclib.so*")))
    yield from ("libisal.so.2", *filter(None, [ctypes.util.find_library("isal")]))


def _address(array: Bytes) -> int:
    return int(array.__array_interface__["data"][0])


def _pointers(addresses: Sequence[int], start: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*[address + start for address in addresses])


def _cuts(total: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_CUT_BYTES, total - start)) for start in range(0, total, _CUT_BYTES))
