"""Streams: the random numbers of a step, as a function of (seed, step, stage, data-parallel index), not of the past.

    step s begins  ->  Python's, numpy's and torch's generators are seeded by a hash of (seed, s, pp, dp)

So no generator's state has to be kept: who starts at step s, after whatever failure, draws what was drawn there before.
Tensor-parallel peers compute one value together, so they draw the same numbers. Under another layout with other stages
or replicas, a model that draws (dropout) draws other numbers; one that does not draw trains the same everywhere.

Rule of this file: nothing is remembered between steps.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch


def stream_seed(seed: int, step: int, seat: Sequence[int]) -> int:
    """63 bits for a step of a seat (pp, dp)."""
    text = f"{seed}/{step}/" + "/".join(map(str, seat))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_streams(seed: int, step: int, seat: Sequence[int]) -> None:
    """Seed every global generator of this process, those of the devices included. About 50 microseconds."""
    value = stream_seed(seed, step, seat)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
