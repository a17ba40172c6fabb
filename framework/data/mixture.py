"""Mixture: several data sets interleaved by weight, in closed form.

    weights 3 : 1   ->   pattern a a b a, repeated for ever        index 4 q + r  ->  part pattern[r], its sample
                                                                   (number of that part in a pattern) q + (before r)

Weights become shares with a common denominator, the length of the pattern. At every place of the pattern the part
that lags its share most comes next, so that every stretch, not only the long run, has the proportions asked for.
Each part is used in its own order and epoch by epoch: a small part with a large weight simply starts over earlier.

Rule of this file: it combines data sets and never looks inside a sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from framework.data.tokenizer import Tokens
from framework.data.windows import Data

MAX_PATTERN = 1 << 16  # shares are exact where a common denominator up to this exists, else to one part in this


@dataclass(frozen=True, slots=True)
class Pattern:
    """`part[r]` is the part at place r of the pattern, `before[r]` how often it occurred earlier in it."""

    part: NDArray[np.int64]
    before: NDArray[np.int64]
    counts: tuple[int, ...]

    @staticmethod
    def of(weights: Sequence[float]) -> Pattern:
        """The pattern of these weights, all above 0."""
        counts = _counts(weights)
        length = sum(counts)
        shares, seen = np.array(counts), np.zeros(len(counts), np.int64)
        part, before = np.empty(length, np.int64), np.empty(length, np.int64)
        for place in range(length):
            lag = shares * (place + 1) - seen * length
            lag[seen == shares] = -length
            part[place] = chosen = int(lag.argmax())
            before[place] = seen[chosen]
            seen[chosen] += 1
        return Pattern(part, before, counts)

    def __call__(self, index: int) -> tuple[int, int]:
        """(part, its sample) at a global index."""
        cycle, place = divmod(index, len(self.part))
        part = int(self.part[place])
        return part, cycle * self.counts[part] + int(self.before[place])


@dataclass(frozen=True, slots=True)
class MixtureData:
    """`framework.data.windows.Data` made of others. An epoch is what takes the least used-up part once through."""

    parts: tuple[Data, ...]
    pattern: Pattern

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self.parts)

    @property
    def num_train(self) -> int:
        return self._length([part.num_train for part in self.parts])

    @property
    def num_val(self) -> int:
        return self._length([part.num_val for part in self.parts])

    @property
    def fingerprint(self) -> str:
        facts = [*(part.fingerprint for part in self.parts), self.pattern.counts]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        total = sum(self.pattern.counts)
        shares = (
            f"{100 * n / total:.4g}% {part.summary}" for n, part in zip(self.pattern.counts, self.parts, strict=True)
        )
        return "mixture of " + " + ".join(shares)

    def train(self, global_index: int) -> Tokens:
        part, sample = self.pattern(global_index)
        return self.parts[part].train(sample)

    def val(self, index: int) -> Tokens:
        if not 0 <= index < self.num_val:
            raise ValueError(f"data: held-out sample must be in [0, {self.num_val}), got {index}")
        part, sample = self.pattern(index)
        return self.parts[part].val(sample)

    def encode(self, text: str) -> Tokens:
        return self.parts[0].encode(text)

    def decode(self, tokens: Tokens) -> str:
        return self.parts[0].decode(tokens)

    def _length(self, sizes: Sequence[int]) -> int:
        """The most indices that use no sample of any part twice."""
        return min(self._until(part, size) for part, size in enumerate(sizes))

    def _until(self, part: int, size: int) -> int:
        """The index at which a part is asked for its sample number `size`."""
        cycle, rest = divmod(size, self.pattern.counts[part])
        return cycle * len(self.pattern.part) + int(np.flatnonzero(self.pattern.part == part)[rest])


def _counts(weights: Sequence[float]) -> tuple[int, ...]:
    """How often each part stands in the pattern: exact if it can be, else rounded to MAX_PATTERN places."""
    exact = [Fraction(repr(weight)).limit_denominator(MAX_PATTERN) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*counts)
    if min(counts) > 0 and sum(counts) // divisor <= MAX_PATTERN:
        return tuple(count // divisor for count in counts)
    total = math.fsum(weights)
    return tuple(max(1, round(weight / total * MAX_PATTERN)) for weight in weights)
