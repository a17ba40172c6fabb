"""What must hold between a run and its twin, on run directories that are written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framework.drills import DRILLS, checks
from framework.run_dir import RunDir


def written(path: Path, *, losses: list[float], layout: str = "2x2x2", sha: str = "a" * 64, lost: int = 0, **more: Any) -> Path:
    directory = RunDir(path)
    for step, loss in enumerate(losses, 1):
        first = (step - 1) * 4 + (1 if step == more.get("gap_at") else 0)
        directory.metric({"step": step, "loss": loss, "samples": [first, step * 4 - 1], "layout": layout})
    incidents = [{"steps_lost": lost}] if lost else []
    directory.write_summary({"status": more.get("status", "finished"), "state_sha256": sha, "incidents": incidents})
    directory.close()
    return path


def verdicts(run: Path, twin: Path) -> dict[str, bool]:
    return {check.what: check.held for check in checks(run, twin, every_steps=2)}


def test_twins_hold(tmp_path: Path) -> None:
    run = written(tmp_path / "a", losses=[3.0, 2.0, 1.0], lost=2)
    twin = written(tmp_path / "b", losses=[3.0, 2.0, 1.0])
    assert verdicts(run, twin) == dict.fromkeys(("status", "ledger", "lost", "losses", "state"), True)


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("status", {"status": "failed"}),
        ("ledger", {"gap_at": 2}),
        ("lost", {"lost": 3}),
        ("losses", {"losses": [3.0, 2.0001, 1.0]}),
        ("state", {"sha": "b" * 64}),
        ("state", {"layout": "1x3x2"}),
    ],
)
def test_each_violation_is_seen(tmp_path: Path, what: str, wrong: dict[str, Any]) -> None:
    run = written(tmp_path / "a", **({"losses": [3.0, 2.0, 1.0]} | wrong))
    twin = written(tmp_path / "b", losses=[3.0, 2.0, 1.0])
    assert [name for name, held in verdicts(run, twin).items() if not held] == [what]


def test_the_named_drills_have_names_of_their_own() -> None:
    assert len({drill.name for drill in DRILLS}) == len(DRILLS)


def test_whoever_is_named_must_be_the_one_and_nobody_else(tmp_path: Path) -> None:
    run, twin = written(tmp_path / "a", losses=[3.0]), written(tmp_path / "b", losses=[3.0])

    def held() -> bool:
        found = checks(run, twin, every_steps=2, drill=replace(DRILLS[0], kinds=(), news=(), tier="", verdict=("hang", 2)))
        return next(check.held for check in found if check.what == "verdict")

    assert not held()
    directory = RunDir(run)
    directory.event("verdict", step=3, generation=1, reason="", cause="hang", ranks=[2])
    assert held()
    directory.event("verdict", step=3, generation=1, reason="", cause="slow_compute", ranks=[0])
    directory.close()
    assert not held()
