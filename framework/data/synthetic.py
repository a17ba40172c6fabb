"""Synthetic data: samples in closed form, from (seed, index) alone.

    x[t+1] = (5 x[t] + 7) mod V     with probability 1 - noise: a table that a model learns within some hundred steps
    x[t+1] = uniform over V         with probability noise: what it cannot learn, so the least loss is known

Every draw is a hash of (seed, index, t), so nothing depends on the version of Python or numpy, on a file, or on what
was asked before: golden values may rest on it.

Rule of this file: integers in, tokens out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framework.data.order import digest_words, sample_at
from framework.data.sources import SyntheticSource
from framework.data.tokenizer import ByteTokenizer, NumberTokenizer, Tokenizer, Tokens

_MULTIPLIER, _INCREMENT = 5, 7
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SyntheticData:
    """`framework.data.windows.Data` without a corpus. The held-out samples are the last ones of `num_samples`."""

    source: SyntheticSource
    seed: int
    powers: Tokens  # 5^k mod V
    sums: Tokens  # 7 (1 + 5 + ... + 5^(k-1)) mod V
    num_val: int

    @staticmethod
    def of(source: SyntheticSource, *, seed: int) -> SyntheticData:
        """The data of a source under a seed."""
        powers, sums = [1], [0]
        for _ in range(source.seq_len):
            powers.append(powers[-1] * _MULTIPLIER % source.vocab_size)
            sums.append((sums[-1] * _MULTIPLIER + _INCREMENT) % source.vocab_size)
        num_val = math.ceil(source.num_samples * source.val_fraction)
        if num_val >= source.num_samples:
            raise ValueError(
                f"data.num_samples: must leave a sample to train on, got {source.num_samples} of which {num_val} "
                "are held out; raise it or lower data.val_fraction"
            )
        return SyntheticData(source, seed, np.array(powers), np.array(sums), num_val)

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    @property
    def num_train(self) -> int:
        return self.source.num_samples - self.num_val

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source} {self.seed}".encode()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        floor = f"no model can go below {self.entropy:.4f} nats a token"
        return f"synthetic: {self.num_train} train and {self.num_val} held-out samples of {self.source.seq_len} tokens; {floor}"

    @property
    def entropy(self) -> float:
        """The least possible loss, in nats per token."""
        wrong = self.source.noise / self.vocab_size
        right = 1 - wrong * (self.vocab_size - 1)
        return -sum(n * p * math.log(p) for n, p in ((1, right), (self.vocab_size - 1, wrong)) if p > 0)

    def train(self, global_index: int) -> Tokens:
        return self._sample(sample_at(global_index, seed=self.seed, num_samples=self.num_train))

    def val(self, index: int) -> Tokens:
        if not 0 <= index < self.num_val:
            raise ValueError(f"data: held-out sample must be in [0, {self.num_val}), got {index}")
        return self._sample(self.num_train + index)

    def encode(self, text: str) -> Tokens:
        return self._tokenizer.encode(text)

    def decode(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens)

    @property
    def _tokenizer(self) -> Tokenizer:
        return ByteTokenizer() if self.vocab_size == 256 else NumberTokenizer(self.vocab_size)

    def _sample(self, index: int) -> Tokens:
        positions = np.arange(self.source.seq_len + 1)
        words = _words(digest_words(1, self.seed, index)[0], 2 * len(positions))
        afresh = (words[0::2] >> np.uint64(11)).astype(np.float64) < self.source.noise * 2.0**53
        afresh[0] = True
        drawn = (words[1::2] % np.uint64(self.vocab_size)).astype(np.int64)
        since = np.maximum.accumulate(np.where(afresh, positions, 0))
        age = positions - since
        return (self.powers[age] * drawn[since] + self.sums[age]) % self.vocab_size


def _words(key: int, count: int) -> NDArray[np.uint64]:
    """`count` pseudo-random 64-bit words (SplitMix64 from a hashed start)."""
    z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
