"""Indexed tokens: Megatron-LM's .bin/.idx pairs, read as one stream of tokens.

    .idx   "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | documents u64      34 bytes, little-endian
           lengths i32[sequences] | byte offsets i64[sequences] | first sequence of each document i64[documents]
    .bin   the tokens of all sequences, at those offsets

`documents` counts the entries of the last list, which ends with `sequences`: one more than there are documents.
Sequences may lie anywhere in the .bin file, so a range of the stream is gathered sequence by sequence.

Rule of this file: it maps files and reads; it checks what it is given once, when it opens it.
Source: the format as Megatron-LM's `core/datasets/indexed_dataset.py` writes it, version 1.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framework.data.tokenizer import Tokens

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_PROBES = 64


@dataclass(frozen=True, slots=True)
class IndexedTokens:
    """The tokens of all sequences, in the order of the index. `digest` covers the index and probes of the tokens."""

    tokens: NDArray[np.integer]  # the .bin file
    starts: NDArray[np.int64]  # where each sequence begins in the .bin file, in tokens
    ends: NDArray[np.int64]  # where each sequence ends in the stream, in tokens
    num_documents: int
    digest: str

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream. Cost: one search, and one copy for each sequence touched."""
        parts, first = [], int(np.searchsorted(self.ends, start, side="right"))
        for i in range(first, len(self.ends)):
            if start >= stop:
                break
            length = min(stop, int(self.ends[i])) - start
            at = int(self.starts[i]) + start - (int(self.ends[i - 1]) if i else 0)
            parts.append(self.tokens[at : at + length])
            start += length
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def open_indexed(name: str) -> IndexedTokens:
    """Map `<name>.bin` and `<name>.idx`; the name of either file serves as well. Raises ValueError otherwise."""
    path = Path(name).expanduser()
    prefix = str(path.with_suffix("")) if path.suffix in (".bin", ".idx") else str(path)
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise ValueError(
                f"data.path: no such file or folder, got {name!r}; give the common prefix of a .bin and .idx pair "
                f"({prefix + suffix} is missing)"
            )
    dtype, lengths, offsets, num_documents, digest = _read_index(Path(prefix + ".idx"))
    return _checked(Path(prefix + ".bin"), dtype, lengths, offsets, num_documents, digest)


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], int, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, version, code, sequences, documents = (
        _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
    )
    if magic != _MAGIC or version != 1:
        raise ValueError(
            f"data.path: {path} must be a Megatron index of version 1, got {header[:17]!r}; is it another file?"
        )
    if code not in _DTYPES:
        raise ValueError(f"data.path: {path} must hold integer tokens, got {_FLOATS.get(code, f'type code {code}')}")
    if size < _HEADER.size + 12 * sequences + 8 * documents:
        raise ValueError(f"data.path: {path} must hold {sequences} sequences, got only {size} bytes; copy it again")
    body = np.memmap(path, np.uint8, "r", offset=0)
    lists = body[_HEADER.size :]
    lengths = lists[: 4 * sequences].view("<i4")
    offsets = lists[4 * sequences : 12 * sequences].view("<i8")
    return np.dtype(_DTYPES[code]), lengths, offsets, max(0, documents - 1), hashlib.sha256(body.data)


def _checked(
    path: Path,
    dtype: np.dtype[Any],
    lengths: NDArray[np.int32],
    offsets: NDArray[np.int64],
    documents: int,
    digest: Any,
) -> IndexedTokens:
    size = path.stat().st_size
    ends = np.cumsum(lengths, dtype=np.int64)
    last = int((offsets + lengths.astype(np.int64) * dtype.itemsize).max(initial=0))
    if last > size or int(offsets.min(initial=0)) < 0 or int(lengths.min(initial=0)) < 0:
        raise ValueError(f"data.path: {path} must reach {last} bytes, as its index says, got {size}; copy it again")
    if (offsets % dtype.itemsize).any():
        raise ValueError(
            f"data.path: the offsets of {path} must be multiples of {dtype.itemsize}; write the index again"
        )
    tokens = np.memmap(path, dtype, "r", shape=(size // dtype.itemsize,)) if size else np.empty(0, dtype)
    for probe in np.linspace(0, max(0, len(tokens) - 1024), _PROBES, dtype=np.int64):
        digest.update(tokens[probe : probe + 1024].tobytes())
    digest.update(str(size).encode())
    return IndexedTokens(tokens, offsets // dtype.itemsize, ends, documents, digest.hexdigest())
