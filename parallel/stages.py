"""Stages: which layers form a pipeline stage, and which pp rank holds which stages.

    schedule                 stages   placement, pp = 2      why
    gpipe, 1f1b              pp       0 | 1                  one stage a rank
    interleaved_*            2 pp     0 2 | 1 3              "loop": smaller bubble
    zbv_zero_bubble          2 pp     0 3 | 1 2              "V": first and last stage on one rank

The chain of a model with L layers is units 0 .. L+1: the embedding, the layers, norm with head. The embedding
goes with the first stage, norm and head with the last.

Rule of this file: pure. It knows schedules by name only; `pipeline.py` runs them.
"""

from __future__ import annotations

from parallel.boxes import even

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")


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
