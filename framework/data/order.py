"""Order: which sample of the training split a global index means.

    global index   0 .. N-1 | N .. 2N-1 | ...        the cursor: one number, never wraps
    epoch              0    |     1     | ...
    sample         a permutation of 0 .. N-1 in each epoch, another one for every (seed, epoch)

A permutation is a keyed Feistel network on the smallest even number of bits that holds N, walked until it lands
inside [0, N) again (cycle walking). So it costs constant memory for any N, needs no shuffle buffer, and any worker
can compute any entry alone: nothing about the order has to be saved, sent or restored.

Rule of this file: integers in, integers out. It knows no tokens, files or workers.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 3 (cycle walking).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache

NUM_ROUNDS = 6
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Permutation:
    """A bijection of [0, size), chosen by `keys`. At most 4 rounds of walking are expected for any size."""

    size: int
    half_bits: int
    keys: tuple[int, ...]

    @staticmethod
    def keyed(size: int, *key: int) -> Permutation:
        """The permutation of [0, size) that belongs to these integers. Raises ValueError if there is no element."""
        if size < 1:
            raise ValueError(f"order: a permutation needs at least one element, got {size}")
        return Permutation(size, max(1, ((size - 1).bit_length() + 1) // 2), digest_words(NUM_ROUNDS, *key))

    def __call__(self, index: int) -> int:
        """Where `index` goes. Raises ValueError outside [0, size)."""
        if not 0 <= index < self.size:
            raise ValueError(f"order: index must be in [0, {self.size}), got {index}")
        index = self._encipher(index)
        while index >= self.size:
            index = self._encipher(index)
        return index

    def _encipher(self, value: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return left << self.half_bits | right


def sample_at(global_index: int, *, seed: int, num_samples: int) -> int:
    """The sample in [0, num_samples) that a global index, which may exceed one epoch, stands for.

    Raises ValueError for a negative index or an empty split.
    """
    if global_index < 0 or num_samples < 1:
        raise ValueError(f"order: needs an index from 0 and at least one sample, got {global_index} and {num_samples}")
    epoch, index = divmod(global_index, num_samples)
    return _epoch(num_samples, seed, epoch)(index)


@lru_cache(maxsize=64)
def _epoch(num_samples: int, seed: int, epoch: int) -> Permutation:
    return Permutation.keyed(num_samples, seed, epoch)


def mix(value: int) -> int:
    """A 64-bit mixing function (the finalizer of MurmurHash3, as in SplitMix64)."""
    value &= _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def digest_words(count: int, *key: int) -> tuple[int, ...]:
    """`count` (at most 8) 64-bit words that depend on every integer of the key."""
    text = ",".join(map(str, key)).encode()
    return struct.unpack(f"<{count}Q", hashlib.blake2b(text, digest_size=8 * count).digest())
