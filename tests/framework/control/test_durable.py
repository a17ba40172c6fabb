"""Durable saving, with agents that fail as disks do. Real clusters: `test_cluster.py`; real disks: `test_storage.py`."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fault_tolerance.checkpoints import shelf
from fault_tolerance.checkpoints.checkpoint import INDEX
from fault_tolerance.checkpoints.index import entry_to_plain
from fault_tolerance.checkpoints.shard import write_shard
from fault_tolerance.checkpoints.storage import StorageError
from framework.config import decode
from framework.control.durable import Durable, check_same, resolve, tracking_of
from framework.run_dir import RunDir
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box
from tests.framework.composed import composed

SPECS = (TensorSpec("param/a", (4, 3), "float32", None, (0,)),)
PLAN: Any = SimpleNamespace(nodes=("n0",), generation=1, layout="1x1x1", schedule="1f1b")


class Agent:
    """Saves a share for real, and fails the times it is told to, after it has written something. `kept`: what it can hold."""

    def __init__(
        self,
        fails: int = 0,
        error: Callable[[], Exception] = lambda: OSError(errno.ENOSPC, "disk full"),
        kept: range = range(100),
    ) -> None:
        self.fails, self.error, self.asked, self.kept, self.holds = fails, error, 0, kept, False
        self.taken, self.takes, self.over = 0, 0, threading.Event()
        self.over.set()

    def call(self, method: str, *words: Any) -> Any:
        if method in ("hold", "let_go"):
            self.holds = method == "hold"
            return SimpleNamespace(result=lambda timeout_s: list(self.kept))
        if method == "taken":
            self.taken += self.takes
            return SimpleNamespace(result=lambda timeout_s: self.taken)
        assert method == "save" and self.holds
        directory, _, step = words
        self.asked += 1
        entry = write_shard(directory, "n0", [(Piece("param/a", Box.whole((4, 3))), np.full((4, 3), step, np.float32))], specs=SPECS)
        if self.asked <= self.fails:
            return SimpleNamespace(wait=self.over.wait, result=self._fail)
        return SimpleNamespace(wait=self.over.wait, result=lambda timeout_s: entry_to_plain(entry))

    def _fail(self, timeout_s: float) -> None:
        raise self.error()


def durable(tmp_path: Path, *words: str, losses: dict[int, float] | None = None) -> Durable:
    config = decode(composed("model=tiny", "data=synthetic", *words, run_dir=str(tmp_path)))
    return Durable(config, run_id="r", losses=losses)


def save(keeper: Durable, step: int, agent: Agent) -> list[dict[str, Any]]:
    assert keeper.begin(PLAN, step, {"n0": agent}, SPECS)  # type: ignore[dict-item]
    keeper.finish()
    return list(keeper.poll())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.control.durable.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


def test_a_save_that_fails_is_tried_again_at_once(tmp_path: Path) -> None:
    keeper, agent = durable(tmp_path), Agent(fails=2)
    [news] = save(keeper, 4, agent)
    assert news["saved"] and agent.asked == 3
    assert list(shelf.checkpoints(keeper.root)) == [4]
    assert len(list((Path(keeper.root) / "step_000004").iterdir())) == 2, "what failed attempts wrote is gone"


def test_a_snapshot_that_has_gone_meanwhile_is_replaced_by_a_newer_one(tmp_path: Path) -> None:
    """With fast steps the snapshot was freed before the agents were asked to write it; four tries later there was an alarm."""
    keeper, agent = durable(tmp_path), Agent(kept=range(6, 8))
    [news] = save(keeper, 4, agent)
    assert news["saved"] and news["step"] == 7 and not agent.holds
    assert list(shelf.checkpoints(keeper.root)) == [7]


def test_a_node_whose_agent_is_gone_fails_the_save_with_a_word(tmp_path: Path) -> None:
    """Letting go of what was held asked the lost agent too; that ended the saving thread, and nothing was ever told or tried again."""
    keeper = durable(tmp_path, "fault_tolerance.durable.every_steps=4", "fault_tolerance.durable.retries=0")
    assert keeper.begin(PLAN, 4, {}, SPECS)
    keeper.finish()
    [news] = keeper.poll()
    assert not news["saved"] and keeper.due(5)


@pytest.mark.parametrize("error", [lambda: OSError(errno.EIO, "bad sector"), lambda: KeyError("a mistake of ours")])
def test_a_save_that_keeps_failing_stops_nothing_and_leaves_nothing(tmp_path: Path, error: Callable[[], Exception]) -> None:
    """A full disk was made fuller by every attempt; an error of another class ended the saving thread without a word."""
    keeper = durable(tmp_path, "fault_tolerance.durable.every_steps=4", "fault_tolerance.durable.retries=1")
    [news] = save(keeper, 4, Agent(fails=9, error=error))
    assert not news["saved"] and news["attempts"] == 2 and "training goes on" in news["reason"]
    assert not Path(keeper.root).exists() or not list(Path(keeper.root).iterdir())
    assert keeper.due(5), "the next snapshot tries again, whatever the interval says"
    [news] = save(keeper, 5, Agent())
    assert news["saved"]
    assert keeper.age_s is not None and keeper.age_s < 5


@pytest.mark.slow
def test_a_run_that_ends_waits_for_storage_that_is_slow_and_not_for_one_that_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while an object store did not answer held the machine for ten minutes, and a save that took longer than that was given up."""
    monkeypatch.setattr("framework.control.durable.LOOK_S", 0.02)
    keeper, agent = durable(tmp_path), Agent()
    agent.over.clear()
    assert keeper.begin(PLAN, 4, {"n0": agent}, SPECS)  # type: ignore[dict-item]
    agent.takes = 1000
    threading.Timer(1.5, agent.over.set).start()
    assert keeper.finish(patience_s=0.5) == "" and not keeper.failure
    assert list(shelf.checkpoints(keeper.root)) == [4]

    agent.over.clear()
    agent.takes = 0
    assert keeper.begin(PLAN, 8, {"n0": agent}, SPECS)  # type: ignore[dict-item]
    began = time.monotonic()
    assert keeper.finish(patience_s=0.5).startswith(f"a save to {keeper.root} was not waited for")
    assert time.monotonic() - began < 5
    monkeypatch.setattr("framework.control.durable.STALLED_S", 0.5)
    keeper.finish()
    assert "has taken nothing" in keeper.failure, "nor does a run that goes on wait for ever"


def test_storage_is_asked_only_for_what_may_be_newer_than_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recovery asked it for its newest checkpoint: with an object store that had stopped, a lost node cost a minute, not seconds."""
    keeper = durable(tmp_path)
    save(keeper, 8, Agent())
    newest = keeper.newest(than=6)
    assert newest is not None and newest.step == 8
    RunDir(tmp_path).event("checkpoint", step=8, generation=1, reason="", saved=True)

    def asked(root: str) -> dict[int, str]:
        raise AssertionError("it does not answer")

    monkeypatch.setattr("framework.control.durable.shelf.checkpoints", asked)
    for asks in (keeper, durable(tmp_path)):
        assert asks.newest(than=8) is None and asks.newest(than=9) is None
        with pytest.raises(AssertionError, match="does not answer"):
            asks.newest(than=7)
    with pytest.raises(AssertionError, match="does not answer"):
        durable(tmp_path / "new").newest()


def test_a_save_that_fails_slowly_is_told_before_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that had fallen silent was waited for four times, eight minutes long, before there was an alarm."""
    monkeypatch.setattr("framework.control.durable.AT_ONCE_S", 0.0)
    keeper, agent = durable(tmp_path, "fault_tolerance.durable.every_steps=4"), Agent(fails=1)
    [news] = save(keeper, 4, agent)
    assert not news["saved"] and "save failed once" in news["reason"] and agent.asked == 1
    [news] = save(keeper, 5, agent)
    assert news["saved"], "the next snapshot tries again"


def test_a_storage_that_is_gone_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asked a dead S3 what it had ended as by a fault of ours, where its state was in memory."""
    keeper = durable(tmp_path)
    save(keeper, 4, Agent())

    def gone(root: str) -> dict[int, str]:
        raise StorageError("s3://runs: failed after 4 tries: nobody is there")

    with monkeypatch.context() as broken:
        broken.setattr("framework.control.durable.shelf.checkpoints", gone)
        assert keeper.newest() is None
    [told] = keeper.poll()
    assert not told["saved"] and "nobody is there" in told["reason"] and told["age_s"] < 60
    found = keeper.newest()
    assert found is not None and found.step == 4


def test_the_best_are_kept_by_the_newest_held_out_loss_up_to_them(tmp_path: Path) -> None:
    losses: dict[int, float] = {}
    keeper = durable(
        tmp_path, "fault_tolerance.durable.keep_last=1", "fault_tolerance.durable.keep_best=1", losses=losses
    )
    for step, loss in [(3, 2.0), (6, 1.0), (9, 1.5), (12, 1.7)]:
        losses[step - 1] = loss
        save(keeper, step, Agent())
    assert list(shelf.checkpoints(keeper.root)) == [6, 12]


def test_on_demand_is_asked_by_a_file_and_answered_once(tmp_path: Path) -> None:
    keeper = durable(tmp_path)
    assert not keeper.due(3)
    (tmp_path / "control").mkdir(parents=True)
    (tmp_path / "control" / "checkpoint").touch()
    assert keeper.due(3)
    assert (keeper.newly_requested(), keeper.newly_requested()) == (True, False), "the crew is asked once"
    save(keeper, 3, Agent())
    assert not keeper.due(4) and not keeper.newly_requested()


def test_a_run_that_continues_another_keeps_its_identity_in_wandb(tmp_path: Path) -> None:
    keeper = durable(tmp_path / "a")
    first = RunDir(tmp_path / "a")
    save(keeper, 3, Agent())
    path = resolve(str(tmp_path / "a"), own="")
    assert path is not None and tracking_of(path) == first.tracking_id == first.run_id
    second = RunDir(tmp_path / "b")
    second.track_as(first.tracking_id)
    assert (second.tracking_id, second.run_id != first.run_id) == (first.run_id, True)
    save(durable(tmp_path / "b"), 5, Agent())
    third = resolve(str(tmp_path / "b"), own="")
    assert third is not None and tracking_of(third) == first.run_id, "and so does the one after it"


def test_auto_is_the_newest_checkpoint_beside_the_run_and_none_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller once looked for it again, and found the run that it was starting."""
    own = str(tmp_path / "runs" / "c")
    assert resolve("auto", own=own) is None
    for name, step in (("a", 3), ("b", 0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("fault_tolerance: {durable: {dir: null}}\n")
        if step:
            save(durable(tmp_path / "runs" / name), step, Agent())
    found = resolve("auto", own=own)
    assert found == str(tmp_path / "runs" / "a" / "checkpoints" / "step_000003"), "b is newer, and has saved nothing"
    assert resolve(found, own=own) == found
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/a", own=own) == found, "as another process finds it"


def test_auto_says_when_the_newest_checkpoint_is_of_another_version_and_does_not_begin_anew(tmp_path: Path) -> None:
    """It was passed over like a damaged one: after an upgrade of the program, a job that goes on by itself lost all that it had learnt."""
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("fault_tolerance: {durable: {dir: null}}\n")
    save(durable(run), 3, Agent())
    index = run / "checkpoints" / "step_000003" / INDEX
    index.write_text(index.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="version must be 2, got 1; use the Holdfast that wrote it"):
        resolve("auto", own=str(tmp_path / "runs" / "b"))
    assert shelf.newest(str(run / "checkpoints")) is None, "for a run under way it is none of its own"


def test_a_changed_config_is_refused_or_written_down_by_key(tmp_path: Path) -> None:
    save(durable(tmp_path), 3, Agent())
    path = resolve(str(tmp_path), own="")
    assert path is not None

    def check(*words: str) -> tuple[str, ...]:
        return check_same(decode(composed("model=tiny", "data=synthetic", *words, run_dir=str(tmp_path))), path)

    assert check() == ()
    assert check("layout.pp=1", "optim.lr=1e-4") == (
        "optim.lr: 0.003 -> 0.0001", "layout.pp: 2 -> 1", "layout.num_microbatches: 4 -> 1",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model.dim: must be \d+ as in the run that is resumed, got 96"):
        check("model.dim=96")
