"""Checks: which numbers go together, said before any process starts.

    layout x schedule x microbatches x model x wrapping  ->  nothing, or a ValueError that says what to change

Some of these torch itself would refuse, but in the middle of the first step and on some ranks only; others it
accepts and computes wrongly (measured with torch 2.13: losses off by 0.02 to 0.6).

Rule of this file: pure. Every message names the key, the rule, the value, and a way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.boxes import chunk
from parallel.layout import Layout
from parallel.stages import BUCKET_BYTES, num_stages, units_of_stage

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")
PRECISION_NAMES = ("fp32", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNumbers:
    """What the checks need to know of a model. None: it has no such number, or it is not known yet."""

    num_layers: int
    vocab_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_dim: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapping:
    """What is wrapped around the layers, and how the stream is cut. Layers of fewer bytes than a bucket share one."""

    precision: str = "fp32"
    sequence_parallel: bool = True
    reshard_after_forward: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    bucket_bytes: int = BUCKET_BYTES


def check(
    model: ModelNumbers,
    *,
    layout: Layout,
    schedule: str,
    num_microbatches: int,
    wrapping: Wrapping,
    seq_len: int | None = None,
    global_batch: int | None = None,
) -> None:
    """Refuse what does not go together. `global_batch` is checked only if given: else replicas pad their share.

    Raises ValueError with the first complaint.
    """
    for complaint in (
        *_tensor(model, layout.tp, wrapping, seq_len),
        *_pipeline(model, layout.pp, schedule, num_microbatches),
        *_wrapping(layout, schedule, wrapping),
        *_batch(layout, num_microbatches, global_batch),
    ):
        raise ValueError(complaint)


def _tensor(model: ModelNumbers, tp: int, wrapping: Wrapping, seq_len: int | None) -> Iterator[str]:
    lengths = {"model.num_heads": model.num_heads, "model.ffn_dim": model.ffn_dim}
    if wrapping.sequence_parallel:
        lengths["data.seq_len"] = seq_len
    for key, length in lengths.items():
        if length is not None and length % tp:
            yield f"{key} {length} does not divide by tp {tp}; use layout.tp={_divisors(length)}"
    if model.vocab_size is not None and not _nonempty(model.vocab_size, tp):
        yield f"model.vocab_size: must leave a part for each of tp {tp} ranks, got {model.vocab_size}; use a smaller layout.tp"


def _nonempty(vocab_size: int, tp: int) -> bool:
    start, stop = chunk(vocab_size, tp, tp - 1)
    return stop > start


def _pipeline(model: ModelNumbers, pp: int, schedule: str, num_microbatches: int) -> Iterator[str]:
    if num_microbatches < 1:
        yield f"layout.num_microbatches: must be at least 1, got {num_microbatches}; use layout.num_microbatches=1"
    stages = num_stages(schedule, pp)
    if pp == 1:
        return
    if stages > model.num_layers:
        advice = f"use layout.pp={max(1, pp * model.num_layers // stages)} or layout.schedule=1f1b"
        yield (
            f"layout: schedule {schedule} has {stages} stages at pp {pp}, the model has {model.num_layers} layers; {advice}"
        )
    else:
        units_of_stage(model.num_layers, stages, 0)
    if schedule == "1f1b" and num_microbatches < stages:
        yield (
            f"layout.num_microbatches: must be at least pp {pp} for schedule 1f1b, got {num_microbatches}; "
            f"use layout.num_microbatches={2 * pp}, or layout.schedule=gpipe"
        )
    rounds = max(1, num_microbatches // pp)
    if schedule.startswith("interleaved") and num_microbatches % rounds:
        yield (
            f"layout.num_microbatches: must be a multiple of pp {pp} for schedule {schedule}, got {num_microbatches}; "
            f"use layout.num_microbatches={rounds * pp}"
        )


def _wrapping(layout: Layout, schedule: str, wrapping: Wrapping) -> Iterator[str]:
    if wrapping.precision not in PRECISION_NAMES:
        yield f"layout.precision: must be one of {', '.join(PRECISION_NAMES)}, got {wrapping.precision!r}; use fp32"
    if layout.pp > 1 and schedule in ZERO_BUBBLE:
        wrong = {"reshard_after_forward": wrapping.reshard_after_forward, "compile": wrapping.compile}
        for key in (key for key, on in wrong.items() if on):
            yield (
                f"layout.{key}: must be false with schedule {schedule}, got true; gradients would be wrong without an "
                f"error; use layout.{key}=false or layout.schedule=1f1b"
            )
    if wrapping.compile and layout.tp > 1:
        yield f"layout.compile: must be false with tp above 1, got true at tp {layout.tp}; use layout.compile=false"


def _batch(layout: Layout, num_microbatches: int, global_batch: int | None) -> Iterator[str]:
    parts = layout.dp * num_microbatches
    if global_batch is not None and global_batch % parts:
        yield (
            f"optim.global_batch {global_batch} does not divide by dp {layout.dp} x num_microbatches "
            f"{num_microbatches}; use optim.global_batch={-(-global_batch // parts) * parts}"
        )


def _divisors(length: int) -> str:
    """The small degrees that divide a length, in words."""
    fits = [str(n) for n in range(1, min(length, 64) + 1) if length % n == 0]
    return fits[0] if len(fits) == 1 else f"{', '.join(fits[:-1])} or {fits[-1]}"
