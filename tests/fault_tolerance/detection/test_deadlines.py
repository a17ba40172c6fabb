"""A deadline is learnt from the operation, and is never longer than it must be."""

from __future__ import annotations

import pytest

from fault_tolerance.detection.deadlines import Deadlines, Patience
from parallel.record import Op, Phase, Record, State

DONE = Record(
    ticket=0,
    group=7,
    seq=0,
    op=Op.ALLREDUCE,
    peer=-1,
    dtype=6,
    bytes=4096,
    shape=1,
    state=State.DONE,
    phase=Phase.TRAIN,
    step=5,
    call_ns=1,
    wait_ns=1,
    end_ns=20_000_001,
)


def learnt(*, step_s: float = 0.1, seconds: float = 0.02, steps: int = 10) -> Deadlines:
    deadlines = Deadlines()
    for step in range(steps):
        deadlines.learn_step(step, step_s)
    deadlines.learn([DONE._replace(end_ns=1 + int(seconds * 1e9))] * 20)
    return deadlines


def test_nothing_is_late_before_it_is_known_what_is_usual():
    assert Deadlines().of(DONE) == Patience().unlearnt_s
    assert learnt(steps=4).of(DONE) == Patience().unlearnt_s, "the first steps compile"


def test_a_short_operation_has_the_floor_and_an_unknown_one_the_ceiling():
    assert learnt().of(DONE) == Patience().floor_s
    assert learnt().of(DONE._replace(bytes=1 << 30)) == Patience().ceiling_s


@pytest.mark.parametrize(("step_s", "seconds"), [(0.1, 0.02), (2.0, 1.5), (10.0, 9.0), (60.0, 1.0), (60.0, 50.0)])
def test_a_hang_is_never_unseen_for_longer_than_15_s_or_three_steps(step_s, seconds):
    deadline = learnt(step_s=step_s, seconds=seconds).of(DONE)
    assert deadline <= max(15.0, 3 * step_s)
    assert deadline >= min(10 * seconds, 2 * step_s)


@pytest.mark.parametrize("phase", [Phase.EVALUATE, Phase.CHECKPOINT, Phase.COMPILE, Phase.START])
def test_what_is_no_training_has_the_patience_of_its_phase(phase):
    assert learnt().of(DONE._replace(phase=phase)) == Patience().of(phase) >= 600
