"""Heap: freed memory of a rank that trains stays with its process, for the next step needs it again.

    glibc, left alone      gives the top of a heap back as soon as it is free: each step then has its pages made, and zeroed, anew
    here                   the top KEEP_BYTES stay, and up to KEEP_BYTES / 4 more are asked for at once

A tensor beyond LARGEST_BYTES is mapped by itself and given back when it is freed, as ever: what is kept is bounded for each thread
that allocates. Tensors on a GPU are the caching allocator's matter, which does the same.

Source: mallopt(3). Elsewhere than with glibc nothing is done.
"""

from __future__ import annotations

import ctypes

KEEP_BYTES = 256 << 20
LARGEST_BYTES = 32 << 20  # the most that glibc accepts
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell the C library. Returns whether it has taken all of it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    wanted = {M_TRIM_THRESHOLD: KEEP_BYTES, M_TOP_PAD: KEEP_BYTES // 4, M_MMAP_THRESHOLD: LARGEST_BYTES}
    taken = [mallopt(name, value) == 1 for name, value in wanted.items()]
    return all(taken)
