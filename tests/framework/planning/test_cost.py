"""The cost model: its counts equal the real model's, its times move the right way, its memory is bounded below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework.model import Decoder, flops_per_token, num_params
from framework.planning.cost import Cost, Method, ModelCost, in_flight, predict
from framework.planning.rates import GIB, calibrated, guess
from parallel.layout import Layout
from parallel.stages import SCHEDULES

LAPTOP = ModelCost(num_layers=4, dim=128, num_heads=4, num_kv_heads=2, ffn_dim=352, vocab_size=256, seq_len=256)
SEVEN_B = ModelCost(
    num_layers=32, dim=4096, num_heads=32, num_kv_heads=32, ffn_dim=11008, vocab_size=32000, seq_len=4096
)
CPU = guess("cpu", workers_per_node=2, memory_bytes=4 * GIB)
GPU = guess("cuda", workers_per_node=8, precision="bf16", memory_bytes=75 * GIB)


def cost(layout: str, m: int, *, model: ModelCost = LAPTOP, rates: Any = CPU, **method: Any) -> Cost:
    return predict(model, Layout.parse(layout), m, method=Method(**{"global_batch": 64} | method), rates=rates)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_flops_are_those_of_the_real_model(tied: bool) -> None:
    with torch.device("meta"):
        model = Decoder(
            vocab_size=256, num_layers=4, dim=128, num_heads=4, num_kv_heads=2, ffn_dim=352, tie_embeddings=tied
        )
    numbers = replace(LAPTOP, tied=tied)
    assert numbers.params == num_params(model)
    flops = sum(map(numbers.unit_flops, range(6)))
    assert flops == pytest.approx(flops_per_token(model, seq_len=256), rel=0.005)  # norms are not matrices


def test_one_worker_computes_and_nothing_else() -> None:
    one = cost("1x1x1", 1)
    assert one.step_s == pytest.approx(one.compute_s + one.update_s)
    assert (one.bubble_s, one.tp_s, one.pp_s, one.dp_s) == (0, 0, 0, 0)
    assert one.memory_bytes > CPU.base_bytes + 16 * LAPTOP.params


def test_the_bubble_is_the_textbooks() -> None:
    rates = replace(GPU, unit_s=0.0, inter_latency_s=0.0, intra_latency_s=0.0)
    for pp, m in ((2, 4), (4, 4), (4, 16)):
        plain = cost(f"{pp}x1x1", m, model=SEVEN_B, rates=rates)
        assert plain.bubble_s / plain.compute_s == pytest.approx((pp - 1) / m)
        looped = cost(f"{pp}x1x1", m, model=SEVEN_B, rates=rates, schedule="interleaved_1f1b")
        assert looped.bubble_s / looped.compute_s == pytest.approx((pp - 1) / m / 2)
        assert cost(f"{pp}x1x1", m, schedule="zbv_zero_bubble", model=SEVEN_B, rates=rates).bubble_s < looped.bubble_s


def test_more_microbatches_shrink_the_bubble_and_the_activations() -> None:
    few, many = cost("4x1x1", 4, model=SEVEN_B, rates=GPU), cost("4x1x1", 32, model=SEVEN_B, rates=GPU)
    assert many.bubble_s < few.bubble_s and many.memory_bytes < few.memory_bytes
    gpipe = cost("4x1x1", 32, model=SEVEN_B, rates=GPU, schedule="gpipe")
    assert gpipe.memory_bytes > many.memory_bytes, "gpipe keeps all microbatches"


@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_faster_machines_are_never_slower_and_larger_models_never_cheaper(
    schedule: str, pp: int, dp: int, tp: int, sequence_parallel: bool, reshard: bool
) -> None:
    method = Method(
        global_batch=64, schedule=schedule, sequence_parallel=sequence_parallel, reshard_after_forward=reshard
    )
    model, layout = replace(SEVEN_B, num_layers=8), Layout(pp=pp, dp=dp, tp=tp)
    now = predict(model, layout, 8, method=method, rates=GPU)
    for name in ("flops_per_s", "intra_bytes_per_s", "inter_bytes_per_s", "memory_bytes_per_s"):
        faster = replace(GPU, **{name: 2 * getattr(GPU, name)})
        assert predict(model, layout, 8, method=method, rates=faster).step_s <= now.step_s
    for name in ("num_layers", "ffn_dim", "vocab_size"):
        larger = predict(replace(model, **{name: 2 * getattr(model, name)}), layout, 8, method=method, rates=GPU)
        assert larger.step_s > now.step_s and larger.memory_bytes > now.memory_bytes
    assert min(now.compute_s, now.update_s) > 0 and min(now.bubble_s, now.tp_s, now.pp_s, now.dp_s) >= 0


def test_each_axis_divides_the_state() -> None:
    whole = cost("1x1x1", 64, model=SEVEN_B, rates=GPU).memory_bytes - GPU.base_bytes
    for layout in ("8x1x1", "1x8x1", "1x1x8"):
        part = cost(layout, 64 if layout != "1x8x1" else 8, model=SEVEN_B, rates=GPU, reshard_after_forward=True)
        assert part.memory_bytes - GPU.base_bytes < 0.6 * whole
    assert whole > 16 * SEVEN_B.params


def test_checkpointing_and_bf16_trade_as_they_should() -> None:
    plain = cost("1x1x8", 8, model=SEVEN_B, rates=GPU)
    again = cost("1x1x8", 8, model=SEVEN_B, rates=GPU, activation_checkpointing=True)
    assert again.memory_bytes < plain.memory_bytes and again.compute_s == pytest.approx(plain.compute_s * 4 / 3)
    assert cost("1x1x8", 8, model=SEVEN_B, rates=GPU, precision="bf16").tp_s < plain.tp_s


def test_talking_over_the_network_of_a_node_is_slower_than_inside_it() -> None:
    inside, outside = cost("1x2x8", 1, rates=replace(GPU, workers_per_node=16)), cost("1x2x8", 1, rates=GPU)
    assert inside.dp_s < outside.dp_s and inside.tp_s == pytest.approx(outside.tp_s)
    assert cost("1x1x16", 1, rates=GPU, model=SEVEN_B).tp_s > cost("1x1x8", 1, rates=GPU, model=SEVEN_B).tp_s


def test_dummies_cost_as_much_as_samples() -> None:
    assert cost("1x5x1", 1, global_batch=16).compute_s == pytest.approx(cost("1x4x1", 1, global_batch=16).compute_s)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("gpipe", [8, 8, 8, 8]),
        ("1f1b", [4, 3, 2, 1]),
        ("zbv_zero_bubble", [4] * 4),
        ("interleaved_1f1b", [5.5, 4.5, 3.5, 2.5]),
    ],
)
def test_microbatches_in_flight(schedule: str, expected: list[float]) -> None:
    assert [in_flight(schedule, 4, rank, 8) for rank in range(4)] == expected


def test_a_measured_step_sets_the_pace_for_all_layouts() -> None:
    predicted = cost("2x2x1", 4)
    rates = calibrated(CPU, predicted_s=predicted.step_s, measured_s=3 * predicted.step_s)
    assert cost("2x2x1", 4, rates=rates).step_s == pytest.approx(3 * predicted.step_s)
    assert cost("1x4x1", 1, rates=rates).step_s == pytest.approx(3 * cost("1x4x1", 1).step_s)
    again = calibrated(rates, predicted_s=cost("2x2x1", 4, rates=rates).step_s, measured_s=predicted.step_s)
    assert again.pace == pytest.approx(1.0)
    with pytest.raises(ValueError, match="cost: step times must be above 0"):
        calibrated(CPU, predicted_s=0.0, measured_s=1.0)


def test_the_reason_is_readable_and_its_shares_add_up() -> None:
    reason = cost("2x2x1", 4).reason
    assert reason.startswith("2x2x1 with 4 microbatches: ") and "compute" in reason and "of 4 GiB per worker" in reason


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="8 pipeline stages need as many layers, the model has 4"):
        cost("8x1x1", 8)
