"""Slab: the bytes that one rank adds to a snapshot, and where each of its tensors lies in them.

    rank 3's slab    | param/wq (rows 0..31) | pad | exp_avg/wq (rows 0..31) | pad | ...      offsets: multiples of 64

Only the pieces that a rank *owns* are in it, so a snapshot has every element of the state once, however often the
layout replicates it. A slab follows from the atlas alone: where a byte of a lost node was, any survivor can tell.

Rule of this file: pure. It knows atlases, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.atlas import Atlas, Piece

ALIGN = 64  # a cache line, and the widest vector that the erasure code works on
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """One owned piece in a slab, row-major bytes [offset, offset + nbytes), and the held one that it lies in."""

    piece: Piece
    home: Piece
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Slab:
    """All owned pieces of a rank, in the order of the atlas, and the bytes they need."""

    rank: int
    entries: tuple[Entry, ...]
    nbytes: int


def slab_of(atlas: Atlas, rank: int) -> Slab:
    """The slab of a rank. Raises ValueError for a dtype that is not known here."""
    entries: list[Entry] = []
    offset = 0
    for piece, home in atlas.shares(rank):
        dtype = atlas.by_name[piece.tensor].dtype
        nbytes = piece.box.size * item_bytes(dtype)
        entries.append(Entry(piece, home, dtype, offset, nbytes))
        offset += align(nbytes)
    return Slab(rank, tuple(entries), offset)


def item_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ValueError for an unknown dtype."""
    if dtype not in _BYTES:
        raise ValueError(f"slab: dtype must be one of {', '.join(_BYTES)}, got {dtype!r}")
    return _BYTES[dtype]


def align(nbytes: int, to: int = ALIGN) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to
