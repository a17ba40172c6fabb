"""Which kept states are never used again. Memory and storage are scripted here; their own tests use real ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from framework.plan import Plan, Refused, Seat, Source
from framework.trouble.distrust import Distrust
from parallel.layout import Layout

PLAN = Plan(
    run="r", generation=2, layout=Layout(dp=2), schedule="1f1b", num_microbatches=1, seats=(Seat("n0", 0), Seat("n1", 0)),
    domains={"n0": "n0", "n1": "n1"}, tolerate=1, source=Source("memory", 6), options=(), reason="",
)  # fmt: skip


class World:
    """Snapshots and checkpoints by step; what is rejected is gone from them."""

    def __init__(self, *, snapshots: list[int], saved: list[int]) -> None:
        self.snapshots, self.saved, self.said = snapshots, saved, list[dict[str, Any]]()
        self.distrust = Distrust(
            journal=SimpleNamespace(reached=9, event=lambda kind, **fields: self.said.append({"kind": kind, **fields})),  # type: ignore[arg-type]
            memory=self,  # type: ignore[arg-type]
            durable=SimpleNamespace(newest=self.newest, reject=lambda path: self.saved.remove(int(path))),  # type: ignore[arg-type]
            agents={},
        )

    def look(self, agents: object) -> None:
        pass

    @property
    def snapshot(self) -> int | None:
        return max(self.snapshots, default=None)

    def reject_newest(self) -> None:
        self.snapshots.remove(max(self.snapshots))

    def reject_after(self, step: int) -> None:
        self.snapshots = [kept for kept in self.snapshots if kept <= step]

    def newest(self) -> Source | None:
        return Source("durable", max(self.saved), str(max(self.saved))) if self.saved else None


def spoilt(how: str, clean: int) -> dict[str, Any]:
    return {"how": how, "clean": clean, "ranks": (1,), "evidence": "bits changed"}


def test_what_failed_its_proof_is_not_tried_again_and_the_rest_is() -> None:
    world = World(snapshots=[4, 6], saved=[2, 4])
    world.distrust.failed(PLAN)
    assert (world.snapshots, world.saved) == ([4], [2, 4])
    world.distrust.failed(replace(PLAN, source=Source("durable", 4, "4")))
    assert (world.snapshots, world.saved) == ([4], [2])
    world.distrust.failed(replace(PLAN, source=Source("fresh", 0)))
    assert (world.snapshots, world.saved) == ([4], [2])


def test_a_corrupt_state_takes_with_it_all_that_was_kept_since_it_was_clean() -> None:
    world = World(snapshots=[4, 6, 8], saved=[2, 7])
    trouble = world.distrust.roll_back(PLAN, spoilt("corrupt", 6))
    assert (world.snapshots, world.saved) == ([4, 6], [2])
    assert (trouble.kind, trouble.ranks, trouble.nodes, trouble.planned) == ("nan", (1,), ("n1",), False)
    [verdict] = world.said
    assert (verdict["kind"], verdict["cause"], verdict["ranks"], verdict["action"]) == ("verdict", "corrupt", [1], "roll_back")


def test_there_is_no_way_back_to_nothing_and_none_to_the_same_bad_numbers_twice() -> None:
    with pytest.raises(Refused, match="back to step 1 or before; nothing from before is left"):
        World(snapshots=[4], saved=[2]).distrust.roll_back(PLAN, spoilt("corrupt", 1))
    world = World(snapshots=[4], saved=[])
    world.distrust.roll_back(PLAN, spoilt("diverged", 4))
    with pytest.raises(Refused, match="the numbers stayed bad"):
        world.distrust.roll_back(PLAN, spoilt("diverged", 4))
    world.distrust.roll_back(PLAN, spoilt("corrupt", 4))
