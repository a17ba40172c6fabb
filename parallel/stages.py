"""Stages: which layers form a pipeline stage, and which pp rank holds which stages.

    schedule                 stages   placement, pp = 2      why
    gpipe, 1f1b              pp       0 | 1                  one stage a rank
    interleaved_*            2 pp     0 2 | 1 3              "loop": smaller bubble
    zbv_zero_bubble          2 pp     0 3 | 1 2              "V": first and last stage on one rank

The chain of a model with L layers is units 0 .. L+1: the embedding, the layers, norm with head. The embedding
goes with the first stage, norm and head with the last.

Within a stage, layers that carry little are one bucket: gathered and reduced together. Below 25 MB, which is what DDP's buckets
hold by default, a collective costs what it costs to begin one; a large layer is a bucket by itself, whose reduction hides behind
the computation of the next.

Source of buckets: PyTorch DDP (arXiv 2006.15704, section 3.2.3).

Rule of this file: pure. It knows schedules by name only; `pipeline.py` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.boxes import even

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
BUCKET_BYTES = 25 << 20


def stages_of_rank(schedule: str, pp: int) -> tuple[tuple[int, ...], ...]:
    """For each pp rank, the stages it holds, in chain order.

    With pp = 1 there is no pipeline, so every schedule has one stage. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"layout.schedule: must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if pp == 1 or schedule in ("gpipe", "1f1b"):
        return tuple((r,) for r in range(pp))
    if schedule == "zbv_zero_bubble":
        return tuple((r, 2 * pp - 1 - r) for r in range(pp))
    return tuple((r, r + pp) for r in range(pp))


def num_stages(schedule: str, pp: int) -> int:
    """Number of stages of the whole pipeline."""
    return sum(map(len, stages_of_rank(schedule, pp)))


def units_of_stage(num_layers: int, stages: int, stage: int) -> range:
    """The units of the chain (0 embedding, 1..L layers, L+1 norm and head) that a stage holds.

    Layers are spread evenly. Raises ValueError when there are more stages than layers.
    """
    if stages > num_layers:
        raise ValueError(f"layout: {stages} pipeline stages need as many layers, the model has {num_layers}")
    start, stop = even(num_layers, stages, stage)
    return range(0 if stage == 0 else start + 1, num_layers + 2 if stage == stages - 1 else stop + 1)


def buckets(layer_bytes: Sequence[int], least: int = BUCKET_BYTES) -> tuple[range, ...]:
    """Which consecutive layers of a stage are gathered and reduced together, from their sizes; each has `least` bytes.

    Counted from the last layer. What is left over, the first layers, goes with the stage's other parameters (embedding, norm,
    head): they are needed first and reduced last, too.
    """
    found: list[range] = []
    end, size = len(layer_bytes), 0
    for index in reversed(range(len(layer_bytes))):
        size += layer_bytes[index]
        if size >= least:
            found.insert(0, range(index, end))
            end, size = index, 0
    return tuple(found)
