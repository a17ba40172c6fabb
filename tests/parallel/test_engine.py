"""The engine: each thing it promises, on the smallest layouts that can break it. All layouts: `test_engine_layouts.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from framework.model import Decoder
from framework.training.initial import InitialWeights
from parallel.assemble import materialise, meta
from parallel.boxes import Box
from tests.parallel.compare import Reference, logical_state, loss_error, norm_error, same_bits, state_error, whole_state
from tests.parallel.harness import Pool
from tests.parallel.ranks import TINY, WARMUP_STEPS, Job, batch, keeps_its_promises, train, train_from
from tests.parallel.user_model import Planned, Recurrence

pytestmark = pytest.mark.slow

TIED = TINY | {"tie_embeddings": True}
USER = {"vocab_size": 259, "num_layers": 4, "dim": 32, "length": 64}


def test_one_worker_is_a_plain_torch_loop(one: Reference) -> None:
    job = Job()
    model = meta(lambda: Decoder(**job.model))
    materialise(model, torch.device("cpu"))
    weights = InitialWeights(model, seed=job.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, tuple(parameter.shape), Box.whole(parameter.shape)))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(1, job.steps + 1):
        tokens, labels = batch(job, step)
        loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        for group in optimizer.param_groups:
            group["lr"] = job.lr * step / WARMUP_STEPS
        optimizer.step()
        losses.append(float(loss.detach()))
    run = one(job)
    assert run.losses == pytest.approx(losses, rel=1e-5)
    state = whole_state(run)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(state[f"param/{name}"], parameter.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(state[f"exp_avg/{name}"], optimizer.state[parameter]["exp_avg"].numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1", "1x2x2"])
def test_it_keeps_the_promises_of_the_seam(pool: Pool, layout: str) -> None:
    job = Job(layout=layout)
    assert pool.run(keeps_its_promises, job, world=job.world) == [[]] * job.world


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        ("2x2x1", "1f1b"),
        ("2x1x1", "zbv_zero_bubble"),
        ("1x2x2", "1f1b"),
    ],
)
def test_the_same_layout_twice_gives_the_same_bits(pool: Pool, layout: str, schedule: str) -> None:
    job = Job(layout=layout, schedule=schedule)
    runs = [pool.run(train, job, world=job.world) for _ in range(2)]
    assert same_bits(*runs)


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        ("2x1x1", "1f1b"),
        ("2x2x1", "interleaved_zero_bubble"),
        ("2x1x2", "zbv_zero_bubble"),
        ("1x2x2", "1f1b"),
    ],
)
def test_a_tied_embedding_stays_one_parameter(pool: Pool, one: Reference, layout: str, schedule: str) -> None:
    job = Job(layout=layout, schedule=schedule, model=TIED)
    ranks = pool.run(train, job, world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert norm_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize(("layout", "num_microbatches"), [("2x2x1", 2), ("1x3x1", 1)])
def test_padding_with_ignored_samples_changes_nothing(
    pool: Pool, one: Reference, layout: str, num_microbatches: int
) -> None:
    job = Job(layout=layout, samples=5, num_microbatches=num_microbatches)
    ranks = pool.run(train, job, world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert norm_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize(
    ("layout", "schedule", "shares"),
    [("2x2x1", "1f1b", (6, 2)), ("2x2x1", "interleaved_zero_bubble", (5, 3)), ("1x2x2", "1f1b", (2, 6)), ("1x3x1", "1f1b", (5, 2, 1))],
)
def test_replicas_may_take_unequal_shares_from_one_step_to_the_next(
    pool: Pool, one: Reference, layout: str, schedule: str, shares: tuple[int, ...]
) -> None:
    job = Job(layout=layout, schedule=schedule, steps=4)
    ranks = pool.run(train, job.but(shares=shares), world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert norm_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("layout", ["1x1x2", "2x1x2"])
def test_without_sequence_parallelism_the_numbers_are_the_same(pool: Pool, one: Reference, layout: str) -> None:
    job = Job(layout=layout)
    ranks = pool.run(train, job.but(wrapping={"sequence_parallel": False}), world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [("1x2x1", "1f1b"), ("2x1x1", "zbv_zero_bubble")],
)
def test_activation_checkpointing_does_not_change_a_bit(pool: Pool, layout: str, schedule: str) -> None:
    job = Job(layout=layout, schedule=schedule)
    kept = pool.run(train, job, world=job.world)
    again = pool.run(train, job.but(wrapping={"activation_checkpointing": True}), world=job.world)
    assert same_bits(kept, again)


@pytest.mark.parametrize(("layout", "schedule"), [("1x2x1", "1f1b"), ("2x2x1", "interleaved_1f1b")])
def test_letting_go_of_parameters_after_forward_does_not_change_a_bit(pool: Pool, layout: str, schedule: str) -> None:
    job = Job(layout=layout, schedule=schedule)
    kept = pool.run(train, job, world=job.world)
    again = pool.run(train, job.but(wrapping={"reshard_after_forward": True}), world=job.world)
    assert same_bits(kept, again)


@pytest.mark.parametrize(
    ("layout", "schedule", "layers"),
    [("1x2x1", "1f1b", 1), ("1x2x1", "1f1b", 3), ("2x2x1", "1f1b", 2), ("2x2x1", "zbv_zero_bubble", 1)],
)
def test_layers_of_one_bucket_train_to_the_bit_as_with_the_root(
    pool: Pool, layout: str, schedule: str, layers: int
) -> None:
    job = Job(layout=layout, schedule=schedule)
    together = pool.run(train, job, world=job.world)
    layer_bytes = 4 * sum(p.numel() for p in meta(lambda: Decoder(**job.model)).layers["0"].parameters())
    bucket_bytes = (layers - 1) * layer_bytes + 1
    apart = pool.run(train, job.but(wrapping={"bucket_bytes": bucket_bytes}), world=job.world)
    assert same_bits(together, apart)


@pytest.mark.parametrize("layout", ["1x1x2", "2x2x1"])
def test_bf16_computes_in_bf16_and_keeps_fp32_state(pool: Pool, one: Reference, layout: str) -> None:
    job = Job(layout=layout)
    ranks = pool.run(train, job.but(wrapping={"precision": "bf16"}), world=job.world)
    assert 1e-7 < loss_error(one(job), ranks) < 2e-2
    assert all(values.dtype == np.float32 for rank in ranks for values in rank.pieces.values())


def test_a_compiled_model_trains_alike(pool: Pool, one: Reference) -> None:
    """Checkpointing around `layer.compile()` once ran it uncompiled, unnoticed: so its last bits must differ."""
    job = Job(layout="2x1x1")
    plain = pool.run(train, job, world=job.world)
    wrapping = {"compile": True, "activation_checkpointing": True}
    ranks = pool.run(train, job.but(wrapping=wrapping), world=job.world, timeout_s=400)
    assert not same_bits(plain, ranks)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize(
    ("before", "after"),
    [("1x1x1", "2x2x1"), ("2x2x1", "1x1x2"), ("1x1x2", "3x1x1"), ("2x1x2", "1x3x1")],
)
def test_a_state_goes_on_under_another_layout(pool: Pool, one: Reference, before: str, after: str) -> None:
    job = Job(steps=4, num_microbatches=3, samples=6)
    half = job.but(layout=before, steps=2)
    whole = logical_state(pool.run(train, half, world=half.world), one(half))
    rest = job.but(layout=after)
    ranks = pool.run(train_from, rest, 2, whole, world=rest.world)
    reference = one(job)
    assert ranks[0].losses == pytest.approx(reference.losses[2:], rel=1e-5)
    assert state_error(reference, ranks) < 1e-4


def test_a_model_of_ones_own_needs_only_the_contract(pool: Pool, one: Reference) -> None:
    job = Job(layout="2x2x1", model=USER, target=Recurrence)
    ranks = pool.run(train, job, world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


@pytest.mark.parametrize("layout", ["1x2x2", "2x1x2"])
def test_a_plan_of_ones_own_cuts_it_too(pool: Pool, one: Reference, layout: str) -> None:
    job = Job(layout=layout, model=USER, target=Planned, wrapping={"sequence_parallel": False})
    ranks = pool.run(train, job, world=job.world)
    assert loss_error(one(job), ranks) < 1e-5
    assert state_error(one(job), ranks) < 1e-4


def test_a_model_without_a_plan_is_not_cut(pool: Pool) -> None:
    job = Job(layout="1x1x2", model=USER, target=Recurrence)
    with pytest.raises(
        RuntimeError, match=r"ValueError: layout\.tp: must be 1 for model Recurrence, which has no tp_plan"
    ):
        pool.run(train, job, world=2)
