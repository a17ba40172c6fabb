"""Checks: each refusal, word for word where a person would read it."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.checks import ModelNumbers, Wrapping, check
from parallel.layout import Layout

TINY = ModelNumbers(num_layers=4, vocab_size=259, num_heads=4, num_kv_heads=2, ffn_dim=176)


def refuse(match: str, layout: str, *, model: ModelNumbers = TINY, **changes: Any) -> None:
    values: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 4, "wrapping": Wrapping()} | changes
    with pytest.raises(ValueError, match=match):
        check(model, layout=Layout.parse(layout), **values)


def accept(layout: str, **changes: Any) -> None:
    values: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 4, "wrapping": Wrapping()} | changes
    check(TINY, layout=Layout.parse(layout), **values)


def test_heads_must_divide() -> None:
    model = ModelNumbers(num_layers=4, num_heads=6)
    refuse(r"^model\.num_heads 6 does not divide by tp 4; use layout\.tp=1, 2, 3 or 6$", "1x1x4", model=model)


def test_the_inner_dimension_must_divide() -> None:
    model = ModelNumbers(num_layers=4, num_heads=4, ffn_dim=171)
    refuse(r"^model\.ffn_dim 171 does not divide by tp 2; ", "1x1x2", model=model)


def test_the_sequence_must_divide_only_when_it_is_cut() -> None:
    refuse(r"^data\.seq_len 63 does not divide by tp 2; ", "1x1x2", seq_len=63)
    accept("1x1x2", seq_len=63, wrapping=Wrapping(sequence_parallel=False))


def test_fewer_key_heads_than_tp_are_fine() -> None:
    accept("1x1x4")


def test_every_tensor_parallel_rank_needs_some_vocabulary() -> None:
    model = ModelNumbers(num_layers=4, num_heads=4, vocab_size=5)
    refuse(r"^model\.vocab_size: must leave a part for each of tp 4 ranks, got 5; ", "1x1x4", model=model)


def test_every_stage_needs_a_layer() -> None:
    refuse(
        r"^layout: schedule interleaved_1f1b has 8 stages at pp 4, the model has 4 layers; use layout\.pp=2 or ",
        "4x1x1",
        schedule="interleaved_1f1b",
    )
    refuse(r"has 5 stages at pp 5", "5x1x1", num_microbatches=5)


def test_1f1b_needs_a_microbatch_a_stage() -> None:
    refuse(r"^layout\.num_microbatches: must be at least pp 4 for schedule 1f1b, got 2; ", "4x1x1", num_microbatches=2)
    accept("4x1x1", num_microbatches=2, schedule="gpipe")


def test_interleaving_needs_whole_rounds() -> None:
    refuse(
        r"^layout\.num_microbatches: must be a multiple of pp 2 for schedule interleaved_1f1b, got 5; "
        r"use layout\.num_microbatches=4",
        "2x1x1",
        schedule="interleaved_1f1b",
        num_microbatches=5,
    )


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv_zero_bubble"])
@pytest.mark.parametrize("key", ["reshard_after_forward", "compile"])
def test_what_would_be_silently_wrong_is_refused(schedule: str, key: str) -> None:
    wrapping = Wrapping(**{key: True})
    refuse(rf"^layout\.{key}: must be false with schedule {schedule}", "2x1x1", schedule=schedule, wrapping=wrapping)
    accept("1x2x1", schedule=schedule, wrapping=wrapping)


def test_compile_does_not_go_with_tp() -> None:
    refuse(r"^layout\.compile: must be false with tp above 1", "1x1x2", wrapping=Wrapping(compile=True))


def test_precision_is_one_of_two() -> None:
    refuse(r"^layout\.precision: must be one of fp32, bf16, got 'fp8'", "1x1x1", wrapping=Wrapping(precision="fp8"))


def test_a_batch_divides_where_it_is_asked_to() -> None:
    refuse(
        r"^optim\.global_batch 30 does not divide by dp 4 x num_microbatches 4; use optim\.global_batch=32$",
        "1x4x1",
        global_batch=30,
    )
    accept("1x4x1")


def test_a_step_has_a_microbatch() -> None:
    refuse(r"^layout\.num_microbatches: must be at least 1, got 0", "1x1x1", num_microbatches=0)
