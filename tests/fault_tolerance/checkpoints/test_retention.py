"""Which checkpoints stay, and why."""

import pytest

from fault_tolerance.checkpoints.retention import retain


def _kept(steps: list[int], **rule: object) -> list[int]:
    return [v.step for v in retain(steps, **rule) if v.keep]  # type: ignore[arg-type]


def test_the_newest_stay() -> None:
    assert _kept([5, 1, 3, 2, 4], keep_last=2) == [4, 5]
    assert _kept([7], keep_last=3) == [7]
    assert _kept([], keep_last=1) == []


def test_milestones_and_the_best_stay_too() -> None:
    steps = [100, 200, 300, 400, 500]
    assert _kept(steps, keep_last=1, keep_every=200) == [200, 400, 500]
    losses = {100: 3.0, 200: 1.5, 300: 2.0, 500: 9.0}
    assert _kept(steps, keep_last=1, keep_best=2, losses=losses) == [200, 300, 500]


def test_every_verdict_says_why() -> None:
    reasons = {v.step: v.reason for v in retain([1, 2, 4, 5], keep_last=1, keep_every=2, keep_best=1, losses={1: 0.1})}
    assert reasons == {1: "among the lowest losses", 2: "a multiple of 2", 4: "a multiple of 2", 5: "among the newest"}
    assert retain([1, 3], keep_last=1)[0].reason == "newer ones are kept"


def test_the_last_checkpoint_cannot_be_retired() -> None:
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        retain([1], keep_last=0)
