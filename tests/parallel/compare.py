"""Comparing runs: the state of many ranks against the whole state of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.parallel.harness import Pool
from tests.parallel.ranks import Job, Trained, train


class Reference:
    """One worker's run of a job, trained once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._runs: dict[str, Trained] = {}

    def __call__(self, job: Job) -> Trained:
        job = job.but(layout="1x1x1", schedule="1f1b", num_microbatches=2)
        key = repr(job)
        if key not in self._runs:
            self._runs[key] = self._pool.run(train, job, world=1)[0]
        return self._runs[key]


def loss_error(one: Trained, ranks: Sequence[Trained]) -> float:
    """Greatest relative difference of any loss, validation loss included, on any rank."""
    return max(
        abs(mine - theirs) / abs(mine)
        for rank in ranks
        for mine, theirs in zip([*one.losses, one.val_loss], [*rank.losses, rank.val_loss], strict=True)
    )


def norm_error(one: Trained, ranks: Sequence[Trained]) -> float:
    """Greatest relative difference of any gradient norm."""
    return max(abs(mine - theirs) / mine for rank in ranks for mine, theirs in zip(one.norms, rank.norms, strict=True))


def whole_state(one: Trained) -> dict[str, np.ndarray]:
    """The logical state, from a run of one worker."""
    assert all(not any(piece.box.start) for piece in one.pieces)
    return {piece.tensor: values for piece, values in one.pieces.items()}


def logical_state(ranks: Sequence[Trained], like: Trained) -> dict[str, np.ndarray]:
    """The logical state, put together from the pieces of all ranks; replicas must have equal bits."""
    whole = {name: np.full_like(values, np.nan) for name, values in whole_state(like).items()}
    for rank in ranks:
        for piece, values in rank.pieces.items():
            part = whole[piece.tensor][tuple(map(slice, piece.box.start, piece.box.stop))]
            assert np.isnan(part).all() or np.array_equal(part, values), f"replicas of {piece.tensor} differ"
            part[...] = values
    assert not any(np.isnan(values).any() for values in whole.values()), "some of the state is nowhere"
    return whole


def state_error(one: Trained, ranks: Sequence[Trained]) -> float:
    """Greatest absolute difference of any element of parameters and moments."""
    mine, theirs = whole_state(one), logical_state(ranks, one)
    return max(float(np.abs(mine[name] - theirs[name]).max()) for name in mine)


def same_bits(one: Sequence[Trained], other: Sequence[Trained]) -> bool:
    """Whether two runs of one layout agree in every bit, losses and norms included."""
    return all(
        a.losses == b.losses
        and a.norms == b.norms
        and a.pieces.keys() == b.pieces.keys()
        and all(np.array_equal(a.pieces[piece], b.pieces[piece]) for piece in a.pieces)
        for a, b in zip(one, other, strict=True)
    )
