"""Buffers: one view on whatever holds a shard's bytes: a torch tensor, a numpy array, a slice of shared memory.

    torch.bfloat16 (4, 3) ----+
    memoryview of 24 bytes ---+-->  array (4, 3) of uint16, sharing the memory
    numpy int16 (4, 3) -------+

Bytes are moved, never interpreted, so an unsigned carrier of the same width stands for every dtype, bfloat16 too.

Rule of this file: no copies. A buffer that cannot be viewed is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

DTYPES = {  # name: (safetensors code, bytes of an element)
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

Bytes: TypeAlias = NDArray[np.uint8]
Array: TypeAlias = NDArray[Any]


def item_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ValueError for a dtype that the format does not know."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype][1]


def byte_view(buffer: Any) -> Bytes:
    """The buffer's memory as a flat uint8 array, shared. Raises ValueError if it is not contiguous on the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buffer, torch.Tensor):
        if not buffer.is_contiguous() or buffer.device.type != "cpu":
            raise ValueError(f"buffer: a tensor must be contiguous and on the CPU, got {buffer.device}; copy it first")
        flat: Bytes = buffer.detach().reshape(-1).view(torch.uint8).numpy()
        return flat
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError("buffer: an array must be C-contiguous; pass np.ascontiguousarray of it")
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def array_view(buffer: Any, dtype: str, shape: Sequence[int], *, where: str) -> Array:
    """The buffer as an array of `shape` whose carrier is as wide as `dtype`, shared.

    Raises ValueError when the number of bytes is not what dtype and shape need.
    """
    flat, width = byte_view(buffer), item_bytes(dtype)
    if flat.nbytes != width * math.prod(shape):
        raise ValueError(
            f"{where}: must have {width * math.prod(shape)} bytes for {dtype} {tuple(shape)}, got {flat.nbytes}"
        )
    return flat.view(f"u{width}").reshape(tuple(shape))
