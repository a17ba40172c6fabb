"""Batching: which samples of a global batch a data-parallel replica takes, and fetching them before they are needed.

    global batch 10, dp 3, 2 microbatches        replica 0:  0 1 2 -     every replica has as many places, a multiple
    samples 0 .. 9                               replica 1:  3 4 5 -     of the microbatches; `-` is a dummy, whose
                                                 replica 2:  6 7 8 9     labels are ignored and which changes no loss

So any number of replicas can train on any batch, each sample is used once, and a lost replica changes who takes a
sample but never which samples a step has. Replicas may be told to take unequal shares: then their microbatches have
more or fewer places, and are as many as before.

Rule of this file: a batch is a function of its step, so going back is asking again. B places, T = seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from framework.data.tokenizer import Tokens
from framework.data.windows import Data
from parallel.boxes import even

IGNORED = -100


def places(*, global_batch: int, dp: int, num_microbatches: int) -> int:
    """How many samples and dummies each replica has: the least that serves the fullest one."""
    fullest = math.ceil(global_batch / dp)
    return math.ceil(fullest / num_microbatches) * num_microbatches


def share(*, first_sample: int, global_batch: int, dp: int, dp_index: int, num_microbatches: int) -> list[int | None]:
    """The global indices that a replica takes, in order; None is a dummy. Equally many on every replica."""
    start, stop = even(global_batch, dp, dp_index)
    taken: list[int | None] = list(range(first_sample + start, first_sample + stop))
    size = places(global_batch=global_batch, dp=dp, num_microbatches=num_microbatches)
    return taken + [None] * (size - len(taken))


def unequal(*, first_sample: int, shares: Sequence[int], dp_index: int, num_microbatches: int) -> list[int | None]:
    """The same where replica i takes `shares[i]` samples: as few dummies as fill its own last row."""
    start = first_sample + sum(shares[:dp_index])
    taken: list[int | None] = list(range(start, start + shares[dp_index]))
    return taken + [None] * (-len(taken) % num_microbatches)


def tokens_labels(
    sample: Callable[[int], Tokens], indices: Sequence[int | None], *, seq_len: int
) -> tuple[Tensor, Tensor]:
    """(tokens_BT, labels_BT) of these samples; `sample` is `data.train` or `data.val`."""
    tokens = np.zeros((len(indices), seq_len), np.int64)
    labels = np.full((len(indices), seq_len), IGNORED, np.int64)
    for row, index in enumerate(indices):
        if index is not None:
            window = sample(index)
            tokens[row], labels[row] = window[:-1], window[1:]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


class Loader:
    """A replica's batches of every step, and its share of the held-out samples.

    While a step computes, a thread makes the batch of the next one, and reads no further ahead. Close it, or use it
    in a `with`. `eval_samples` held-out samples are used, or as many as there are.
    """

    def __init__(
        self,
        data: Data,
        *,
        seq_len: int,
        global_batch: int,
        dp: int,
        dp_index: int,
        num_microbatches: int,
        eval_samples: int = 0,
    ) -> None:
        self._data, self._seq_len, self._global_batch = data, seq_len, global_batch
        self._dp, self._dp_index, self._num_microbatches = dp, dp_index, num_microbatches
        self._num_held_out = min(eval_samples, data.num_val)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._shares: tuple[int, ...] = ()

    def share(self, shares: Sequence[int]) -> None:
        """From the next batch that is asked for, replica i takes `shares[i]` samples of a step; empty: all alike."""
        self._shares, self._ahead = tuple(shares), None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens_BT, labels_BT) of this replica's part of step `step`, from 1, whatever was asked for before."""
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == step else self._train(step)
        self._ahead = step + 1, self._thread.submit(self._train, step + 1)
        return found

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """This replica's share of the held-out samples, in batches of the shape of a training batch of equal shares."""
        size = places(global_batch=self._global_batch, dp=self._dp, num_microbatches=self._num_microbatches)
        mine = self._share(first_sample=0, global_batch=self._num_held_out, multiple=size)
        return [self._read(self._data.val, mine[i : i + size]) for i in range(0, len(mine), size)]

    @property
    def held_out_tokens(self) -> int:
        """Labels that count in `held_out`, over all replicas."""
        return self._num_held_out * self._seq_len

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _train(self, step: int) -> tuple[Tensor, Tensor]:
        first = (step - 1) * self._global_batch
        if self._shares:
            places = unequal(
                first_sample=first, shares=self._shares, dp_index=self._dp_index, num_microbatches=self._num_microbatches
            )
            return self._read(self._data.train, places)
        mine = self._share(first_sample=first, global_batch=self._global_batch, multiple=self._num_microbatches)
        return self._read(self._data.train, mine)

    def _share(self, *, first_sample: int, global_batch: int, multiple: int) -> list[int | None]:
        return share(
            first_sample=first_sample,
            global_batch=global_batch,
            dp=self._dp,
            dp_index=self._dp_index,
            num_microbatches=multiple,
        )

    def _read(self, sample: Callable[[int], Tokens], indices: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        return tokens_labels(sample, indices, seq_len=self._seq_len)
