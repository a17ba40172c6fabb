"""The DeepSpeed engine: the same numbers as FSDP2, every stage, and the state is where the atlas says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parallel.compare import Reference, logical_state, loss_error, norm_error, same_bits, state_error
from tests.parallel.harness import Pool
from tests.parallel.ranks import TINY, Job, keeps_its_promises, train, train_from
from tests.parallel.user_model import PartlyFrozen, Recurrence
from tests.parallel.zero_ranks import what_deepspeed_holds, what_stays_behind

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

ODD = TINY | {"vocab_size": 257, "dim": 72, "tie_embeddings": True}  # nothing divides
USER = {"vocab_size": 259, "num_layers": 4, "dim": 32, "length": 64}
STAGES = [{"stage": s, "offload_optimizer": o} for s in (1, 2, 3) for o in (False, True)]


@pytest.mark.parametrize("zero", STAGES, ids=str)
@pytest.mark.parametrize("layout", ["1x1x1", "1x3x1"])
def test_it_trains_as_fsdp2_does(pool: Pool, one: Reference, layout: str, zero: dict[str, object]) -> None:
    job = Job(layout=layout, model=ODD, steps=3)
    ranks = pool.run(train, job.but(zero=zero), world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert norm_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("zero", STAGES, ids=str)
def test_it_keeps_the_promises_of_the_seam(pool: Pool, zero: dict[str, object]) -> None:
    assert pool.run(keeps_its_promises, Job(layout="1x2x1", zero=zero), world=2) == [[]] * 2


@pytest.mark.parametrize("layout", ["1x1x1", "1x4x1"])
def test_the_state_is_what_deepspeed_s_own_accessors_say(pool: Pool, layout: str) -> None:
    models = [{"model": ODD}, {"model": USER, "target": PartlyFrozen}]
    jobs = [Job(layout=layout, zero=zero, **model) for zero in STAGES for model in models]  # type: ignore[arg-type]
    assert pool.run(what_deepspeed_holds, jobs, world=jobs[0].world, timeout_s=240) == [[]] * jobs[0].world


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_layout_twice_gives_the_same_bits(pool: Pool, stage: int) -> None:
    job = Job(layout="1x2x1", zero={"stage": stage})
    assert same_bits(*(pool.run(train, job, world=2) for _ in range(2)))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("target", [Recurrence, PartlyFrozen])
def test_buffers_and_what_is_not_trained_are_as_in_fsdp2(pool: Pool, one: Reference, target: type, stage: int) -> None:
    """DeepSpeed's own universal load restores neither of them."""
    job = Job(layout="1x2x1", model=USER, target=target)
    ranks = pool.run(train, job.but(zero={"stage": stage}), world=2)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("1x4x1", {"stage": 1}), ("1x3x1", {"stage": 3})),
        (("1x3x1", {"stage": 3}), ("1x2x1", {"stage": 2, "offload_optimizer": True})),
        (("1x2x1", {"stage": 2}), ("2x1x2", None)),
        (("2x2x1", None), ("1x2x1", {"stage": 3})),
        (("1x3x1", {"stage": 2}), ("1x1x1", {"stage": 2})),
    ],
    ids=str,
)
def test_a_state_goes_on_under_another_stage_number_of_ranks_or_engine(
    pool: Pool, one: Reference, before: tuple[str, dict[str, object]], after: tuple[str, dict[str, object]]
) -> None:
    """DeepSpeed itself refuses another number of ranks, and cannot go between stages 1 or 2 and 3."""
    job = Job(steps=4, num_microbatches=3, samples=6, model=ODD)
    half = job.but(layout=before[0], zero=before[1], steps=2)
    whole = logical_state(pool.run(train, half, world=half.world), one(half.but(zero=None)))
    rest = job.but(layout=after[0], zero=after[1])
    ranks = pool.run(train_from, rest, 2, whole, world=rest.world)
    reference = one(job)
    assert ranks[0].losses == pytest.approx(reference.losses[2:], rel=1e-5)
    assert state_error(reference, ranks) < 1e-4


def test_frozen_parameters_come_back_on_another_number_of_ranks(pool: Pool, one: Reference) -> None:
    job = Job(model=USER, target=PartlyFrozen, steps=4)
    half = job.but(layout="1x3x1", zero={"stage": 3}, steps=2)
    whole = logical_state(pool.run(train, half, world=3), one(half.but(zero=None)))
    for stage in (1, 3):
        ranks = pool.run(train_from, job.but(layout="1x2x1", zero={"stage": stage}), 2, whole, world=2)
        assert ranks[0].losses == pytest.approx(one(job).losses[2:], rel=1e-5)
        assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("zero", [z for z in STAGES if z["stage"] > 1 or z["offload_optimizer"]], ids=str)
def test_bf16_computes_in_bf16_and_keeps_fp32_state(pool: Pool, one: Reference, zero: dict[str, object]) -> None:
    job = Job(layout="1x2x1")
    ranks = pool.run(train, job.but(zero=zero, wrapping={"precision": "bf16"}), world=2)
    assert 1e-7 < loss_error(one(job), ranks) < 2e-2
    assert all(values.dtype == np.float32 for rank in ranks for values in rank.pieces.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activation_checkpointing_trains_alike(pool: Pool, one: Reference, stage: int) -> None:
    job = Job(layout="1x2x1")
    ranks = pool.run(train, job.but(zero={"stage": stage}, wrapping={"activation_checkpointing": True}), world=2)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("stage", [1, 3])
def test_a_closed_engine_is_let_go(pool: Pool, stage: int) -> None:
    """ZeRO-3 kept every engine of a process, 250 MB a generation of a 20 M model: a stack of modules in a global."""
    job = Job(layout="1x2x1", zero={"stage": stage})
    assert pool.run(what_stays_behind, job, 3, world=2) == [[]] * 2
