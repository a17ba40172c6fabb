"""What must hold between a run and its twin, on run directories that are written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framework import run_dir
from framework.drills.drill import Drill, Ending, checks, ending
from framework.drills.sets import DRILLS, random_drill
from framework.drills.strikes import KINDS, Hit, Strike
from framework.run_dir import RunDir


def written(path: Path, *, losses: list[float], layout: str = "2x2x2", sha: str = "a" * 64, lost: int = 0, **more: Any) -> Path:
    directory = RunDir(path)
    for step, loss in enumerate(losses, 1):
        first = (step - 1) * 4 + (1 if step == more.get("gap_at") else 0)
        row = {"step": step, "loss": loss, "samples": [first, step * 4 - 1], "layout": layout, "step_time_s": 0.1}
        directory.metric(row | ({"shares": more["shares"]} if step > 1 and "shares" in more else {}))
    incidents = [{"steps_lost": lost, "tier": more.get("tier", "local"), "kind": "crash", "detected_at": 0.0}] if lost else []
    status = {"status": more.get("status", "finished"), "reason": more.get("reason", "")}
    directory.write_summary(status | {"state_sha256": sha, "incidents": incidents})
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


def test_a_run_that_was_resumed_is_judged_together_with_what_came_before(tmp_path: Path) -> None:
    twin = written(tmp_path / "twin", losses=[3.0, 2.0, 1.0])
    before = written(tmp_path / "before", losses=[3.0, 2.0, 9.0], status="interrupted")
    run = written(tmp_path / "run", losses=[3.0, 2.0, 1.0])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[2:]))
    assert all(check.held for check in checks(run, twin, every_steps=2, before=before))
    assert not all(check.held for check in checks(run, twin, every_steps=2))


def test_steps_since_the_checkpoint_may_be_lost_only_where_the_state_came_from_storage(tmp_path: Path) -> None:
    twin = written(tmp_path / "twin", losses=[3.0, 2.0, 1.0])
    for tier, held in (("durable", True), ("parity", False)):
        run = written(tmp_path / tier, losses=[3.0, 2.0, 1.0], lost=6, tier=tier)
        found = {check.what: check.held for check in checks(run, twin, every_steps=2, durable_steps=4)}
        assert found["lost"] is held


def test_an_end_must_have_its_code_its_word_and_leave_nothing(tmp_path: Path) -> None:
    run = written(tmp_path / "a", losses=[3.0], status="failed", reason="state lost: step 1 was reached")
    drill = Drill("d", "", (), exit_code=3, says=("state lost",), strikes=(Strike("step 1", 0.0, "kill_node", "n1"),))
    hit = Hit(drill.strikes[0], 100.0, (7,))
    good = Ending(3, (hit,), ())
    assert all(check.held for check in ending(drill, run, good))
    for what, end in {
        "exit": Ending(1, (hit,), ()),
        "struck": Ending(3, (), ()),
        "clean": Ending(3, (hit,), ("/dev/shm/holdfast-x",)),
    }.items():
        assert [check.what for check in ending(drill, run, end) if not check.held] == [what]
    unsaid = replace(drill, says=("a checkpoint of step 4",))
    assert [check.what for check in ending(unsaid, run, good) if not check.held] == ["word"]


def test_times_that_an_incident_tells_are_held_against_the_clock(tmp_path: Path) -> None:
    """Detection was once told as 0.0 s whenever a process had died, because only the living were asked for their silence."""
    drill = Drill("d", "", (), strikes=(Strike("step 1", 0.0, "kill_node", "n1"),))
    for told, held in ((3.2, True), (1.0, False)):
        directory = RunDir(tmp_path / str(told))
        incident = {"kind": "node_loss", "detected_at": 100.9, "total_s": told, "restore_s": 0.1, "steps_lost": 1}
        directory.write_summary({"status": "finished", "incidents": [incident]})
        directory.event("recovered", step=2, generation=2, reason="", incident=incident)
        [event] = run_dir.events(directory.path)
        (directory.path / "events.jsonl").write_text(json.dumps(event | {"time": 103.4}) + "\n")
        end = Ending(0, (Hit(drill.strikes[0], 100.0, (7,)),), ())
        assert {c.what: c.held for c in ending(drill, directory.path, end)}["times"] is held


def test_the_named_drills_have_names_of_their_own() -> None:
    assert len({drill.name for drill in DRILLS}) == len(DRILLS)
    assert all(strike.kind in KINDS for drill in (*DRILLS, random_drill(3)) for strike in drill.strikes)


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
    assert held(), "a suspicion: no test has confirmed it"
    directory.event("verdict", step=3, generation=1, reason="", cause="slow_compute", ranks=[0], confirmed=True)
    directory.close()
    assert not held()


def told(path: Path, *causes: str, **incident: Any) -> Path:
    """A run of three steps with news of machines and one incident."""
    written(path, losses=[3.0, 2.0, 1.0])
    directory = RunDir(path)
    for cause in causes:
        directory.event("node", step=1, generation=1, reason="", cause=cause)
    record = {"kind": "node_loss", "steps_lost": 0, "tier": "parity"} | incident
    directory.write_summary({"status": "finished", "state_sha256": "a" * 64, "incidents": [record]})
    directory.close()
    return path


DRILL = Drill("d", "", (), (), kinds=("node_loss",), news=("gone", "joined"), tier="parity")


@pytest.mark.parametrize(
    ("what", "causes", "incident"),
    [
        ("none", ("gone", "left", "joined"), {}),
        ("incidents", ("gone", "joined"), {"kind": "crash"}),
        ("machines", ("joined", "gone"), {}),
        ("tier", ("gone", "joined"), {"tier": "durable"}),
    ],
)
def test_what_a_drill_wants_to_happen_must_have_happened_in_its_order(
    tmp_path: Path, what: str, causes: tuple[str, ...], incident: dict[str, Any]
) -> None:
    """Without this, a fault that never fired would pass as one that was survived."""
    run, twin = told(tmp_path / "a", *causes, **incident), written(tmp_path / "b", losses=[3.0, 2.0, 1.0])
    failed = [check.what for check in checks(run, twin, every_steps=2, drill=DRILL) if not check.held]
    assert failed == ([] if what == "none" else [what])


@pytest.mark.parametrize(("more", "held"), [({"shares": [3, 1]}, True), ({}, False), ({"shares": [3, 2]}, False)])
def test_a_drill_of_unequal_shares_wants_them_taken_and_the_batch_whole(tmp_path: Path, more: dict[str, Any], held: bool) -> None:
    run = written(tmp_path / "a", losses=[3.0, 2.0], **more)
    twin = written(tmp_path / "b", losses=[3.0, 2.0])
    found = {c.what: c for c in checks(run, twin, every_steps=2, drill=Drill("x", "", (), shares=True))}
    assert found["shares"].held is held


def test_an_incident_that_was_prepared_for_may_lose_nothing(tmp_path: Path) -> None:
    run, twin = told(tmp_path / "a", kind="preemption", steps_lost=1), written(tmp_path / "b", losses=[3.0, 2.0, 1.0])
    assert [check.what for check in checks(run, twin, every_steps=2) if not check.held] == ["lost"]
