"""Windows: a stream of tokens, cut into samples and parted into training and held-out data.

    tokens   0 ............................................... | ................ end
             train windows of T + 1 tokens, each overlapping     held-out windows, the same;
             the next by one (a label is the next one's input)   not one token is in both

`Data` is what everything behind the data layer sees: samples by number, and nothing about where they come from.

Rule of this file: it knows no files; a stream is anything with a length and `read`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from framework.data.order import Permutation, sample_at
from framework.data.tokenizer import Tokenizer, Tokens


class Data(Protocol):
    """Samples by number. A sample is `seq_len` + 1 token ids, int64: inputs, and labels one further on.

    `train` takes a global index from 0 without end: epochs follow each other, each in another order. `val` takes
    [0, num_val), raises ValueError outside, and does not depend on the seed. `fingerprint` is equal wherever the
    samples are.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def num_train(self) -> int: ...
    @property
    def num_val(self) -> int: ...
    def train(self, global_index: int) -> Tokens: ...
    def val(self, index: int) -> Tokens: ...
    def encode(self, text: str) -> Tokens: ...
    def decode(self, tokens: Tokens) -> str: ...


class Stream(Protocol):
    """Tokens in a row, in files. `digest` is that of their content."""

    @property
    def num_documents(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> Tokens: ...


@dataclass(frozen=True, slots=True)
class WindowData:
    """`Data` over a stream."""

    name: str
    stream: Stream
    tokenizer: Tokenizer
    seq_len: int
    seed: int
    num_train: int
    num_val: int

    @staticmethod
    def of(
        stream: Stream, tokenizer: Tokenizer, *, name: str, seq_len: int, val_fraction: float, seed: int
    ) -> WindowData:
        """Part the stream. Raises ValueError where it is too short for a sample of each kind."""
        num_val = 0
        if val_fraction > 0:
            num_val = max(1, round((len(stream) - 1) // seq_len * val_fraction))
        num_train = (len(stream) - (num_val * seq_len + 1 if num_val else 0) - 1) // seq_len
        if num_train < 1:
            raise ValueError(
                f"data: a training sample of {seq_len} + 1 tokens and {num_val} held out must fit, got {len(stream)} "
                f"tokens in {name}; add data, or lower data.seq_len or data.val_fraction"
            )
        return WindowData(name, stream, tokenizer, seq_len, seed, num_train, num_val)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        facts = [self.stream.digest, self.tokenizer.fingerprint, self.seq_len, self.num_train, self.num_val]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        return (
            f"{self.name}: {len(self.stream):,} tokens of {self.vocab_size} kinds in {self.stream.num_documents:,} documents; "
            f"{self.num_train:,} train and {self.num_val:,} held-out samples of {self.seq_len} tokens"
        )

    def train(self, global_index: int) -> Tokens:
        return self._window(sample_at(global_index, seed=self.seed, num_samples=self.num_train) * self.seq_len)

    def val(self, index: int) -> Tokens:
        # Scattered, always in the same way, so that the first few are a fair draw of all.
        if not 0 <= index < self.num_val:
            raise ValueError(f"data: held-out sample must be in [0, {self.num_val}), got {index}")
        first = len(self.stream) - (self.num_val * self.seq_len + 1)
        return self._window(first + Permutation.keyed(self.num_val, 0)(index) * self.seq_len)

    def encode(self, text: str) -> Tokens:
        return self.tokenizer.encode(text)

    def decode(self, tokens: Tokens) -> str:
        return self.tokenizer.decode(tokens)

    def _window(self, start: int) -> Tokens:
        tokens = self.stream.read(start, start + self.seq_len + 1)
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            worst = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise ValueError(
                f"data.vocab_size: every token of {self.name} must be in [0, {self.vocab_size}), got {worst}; "
                "give the tokenizer, or the vocabulary size, that the data was made with"
            )
        return tokens
