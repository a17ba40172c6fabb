"""Every layout and every schedule that the tiny model admits: the same losses, the same state, and the atlas is right.

Each layout is taken with one of its schedules, those of `MANY` with all; HOLDFAST_WHOLE=1 takes all with all, in all of them twenty
steps twice instead of twelve and four in those of `LONG`, and compares the atlas for four models instead of two: half an hour.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from parallel.checks import ModelNumbers, Wrapping, check
from parallel.layout import Layout
from parallel.stages import SCHEDULES
from tests.parallel.compare import Reference, loss_error, norm_error, same_bits, state_error
from tests.parallel.harness import Pool
from tests.parallel.ranks import TINY, WARMUP_STEPS, WHOLE, Job, Trained, train, what_dtensor_holds

pytestmark = pytest.mark.slow

NUMBERS = ModelNumbers(num_layers=4, vocab_size=259, num_heads=4, num_kv_heads=2, ffn_dim=176)
MODELS = (
    TINY | {"vocab_size": 261, "num_kv_heads": 1},  # leaves the last of 4 ranks three rows fewer than the others
    TINY | {"vocab_size": 257, "dim": 72, "tie_embeddings": True},  # nothing divides
    *((TINY, TINY | {"tie_embeddings": True}) if WHOLE else ()),
)


def admitted(layouts: Iterator[Layout]) -> list[Job]:
    """Each layout with each schedule that makes a difference to it and that the model has layers for."""
    jobs = []
    for layout in layouts:
        for schedule in SCHEDULES if layout.pp > 1 else ("1f1b",):
            job = Job(layout=str(layout), schedule=schedule, num_microbatches=max(2, layout.pp), steps=3 if WHOLE else 2)
            try:
                check(
                    NUMBERS,
                    layout=layout,
                    schedule=schedule,
                    num_microbatches=job.num_microbatches,
                    wrapping=Wrapping(),
                    seq_len=64,
                )
            except ValueError:
                continue
            jobs.append(job)
    return jobs


def name(job: Job) -> str:
    return f"{job.layout}-{job.schedule}"


POWERS = admitted(
    Layout(*degrees) for degrees in itertools.product((1, 2, 4), repeat=3) if Layout(*degrees).world in (1, 2, 4, 8)
)
AFTER_A_LOSS = admitted(
    Layout(*degrees)
    for degrees in [(1, 3, 1), (3, 1, 1), (1, 3, 2), (3, 1, 2), (3, 2, 1), (2, 3, 1), (1, 5, 1), (1, 6, 1), (1, 7, 1)]
)
MANY = {"2x2x1", "2x1x2"}
LONG = {
    "2x2x2-1f1b",
    "2x2x1-interleaved_zero_bubble",
    "2x1x2-zbv_zero_bubble",
}


def chosen(jobs: list[Job]) -> list[Job]:
    """All of them, or each layout once, with another schedule from one layout to the next, and the layouts of `MANY`."""
    turns = dict(zip(dict.fromkeys(job.layout for job in jobs), itertools.count(), strict=False))
    of_layout = {layout: [job for job in jobs if job.layout == layout] for layout in turns}
    once = {layout: of[turns[layout] % len(of)] for layout, of in of_layout.items()}
    return [job for job in jobs if WHOLE or job.layout in MANY or job == once[job.layout]]


def cuts(jobs: list[Job]) -> list[Job]:
    """One job for each way to cut a model: the atlas depends on the schedule by the stages that a rank holds, no more."""
    kinds = {"gpipe": "1f1b", "interleaved_zero_bubble": "interleaved_1f1b"}
    return list({(job.layout, kinds.get(job.schedule, job.schedule)): job for job in jobs}.values())


def test_the_list_is_as_long_as_it_should_be() -> None:
    assert len(POWERS) == 44
    assert {job.layout for job in AFTER_A_LOSS} >= {"1x3x1", "3x1x1", "3x2x1", "2x3x1", "1x6x1", "1x7x1"}
    assert {job.layout for job in chosen(POWERS)} == {job.layout for job in POWERS}
    assert {job.schedule for job in chosen(POWERS)} == set(SCHEDULES)


@pytest.mark.parametrize("job", cuts([*POWERS, *AFTER_A_LOSS]), ids=name)
def test_the_atlas_is_what_dtensor_holds(pool: Pool, job: Job) -> None:
    jobs = [job.but(model=model) for model in MODELS]
    assert pool.run(what_dtensor_holds, jobs, world=job.world) == [[]] * job.world


@pytest.mark.parametrize("job", [*chosen(POWERS), *chosen(AFTER_A_LOSS)], ids=name)
def test_the_same_seed_gives_the_same_loss_and_state(pool: Pool, one: Reference, job: Job) -> None:
    ranks = pool.run(train, job, world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert norm_error(one(job), ranks) < 1e-4
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("job", [job for job in POWERS if WHOLE or name(job) in LONG], ids=name)
def test_runs_stay_together_beyond_the_warm_up_and_repeat_to_the_bit(pool: Pool, one: Reference, job: Job) -> None:
    job = job.but(steps=20 if WHOLE else WARMUP_STEPS + 2)
    ranks = pool.run(train, job, world=job.world, timeout_s=280)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4
    again = pool.run(train, job.but(steps=20 if WHOLE else 4), world=job.world, timeout_s=280)
    assert all(told(rank, len(other.losses)) == told(other) for rank, other in zip(ranks, again, strict=True))
    assert not WHOLE or same_bits(ranks, again)


def told(rank: Trained, steps: int | None = None) -> tuple[list[float], list[float]]:
    """The losses and gradient norms of the first steps: a bit that differs in any weight shows in them."""
    return rank.losses[:steps], rank.norms[:steps]
