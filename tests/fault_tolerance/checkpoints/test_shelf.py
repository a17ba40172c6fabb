"""A run's checkpoints: the newest whole one is taken, torn and foreign directories are not."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint
from fault_tolerance.checkpoints.shelf import checkpoints, newest, remove, sweep, torn
from fault_tolerance.digest import state_sha256
from tests.fault_tolerance.checkpoints.saving import State, atlas_of, decoder_specs, random_state, save

SPECS = decoder_specs(dim=96, ffn_dim=300, vocab=300, layers=2)


def _save(root: Path, step: int) -> None:
    specs = decoder_specs(dim=16, kv_dim=8, ffn_dim=20, vocab=11, layers=1)
    save(root, atlas_of(specs, "1x2x1", layers=1), random_state(specs, seed=step), step=step)


def test_the_newest_committed_checkpoint_is_taken(tmp_path: Path) -> None:
    assert newest(str(tmp_path / "nowhere")) is None
    for step in (9, 100, 20):
        _save(tmp_path, step)
    assert list(checkpoints(str(tmp_path))) == [9, 20, 100]
    assert newest(str(tmp_path)) == str(tmp_path / "step_000100")


def test_torn_and_foreign_directories_are_never_taken(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    _save(tmp_path, 7)
    (tmp_path / "step_000007" / INDEX).unlink()
    (tmp_path / "step_latest").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_000099").write_text("a file")
    assert newest(str(tmp_path)) == str(tmp_path / "step_000005")
    assert list(torn(str(tmp_path))) == [7]
    assert sweep(str(tmp_path), in_progress=[7]) == []
    assert sweep(str(tmp_path)) == [7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000005", "step_000099", "step_latest"]


def test_a_damaged_index_gives_way_to_an_older_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    _save(tmp_path, 6)
    index = tmp_path / "step_000006" / INDEX
    index.write_text(index.read_text().replace('"step": 6', '"step": 8'))
    assert newest(str(tmp_path)) == str(tmp_path / "step_000005")


def test_removing_takes_the_commit_record_first(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    remove(str(tmp_path), [1, 77])
    assert list(checkpoints(str(tmp_path))) == [2]
    assert not (tmp_path / "step_000001").exists()


@pytest.mark.slow
def test_a_saver_killed_at_any_moment_leaves_a_newest_checkpoint_that_verifies(tmp_path: Path) -> None:
    """100 times: start to save, SIGKILL within the next few saves, then the newest visible checkpoint must be whole."""
    rng, root = random.Random(0), str(tmp_path)
    seen_torn = killed = 0
    kept: str | None = None  # the digest of the newest
    while killed < 100:
        last = max(checkpoints(root), default=0)
        child = _fork_saver(root, last)
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        seen_torn += bool(torn(root)) or any(".tmp" in p.name for p in tmp_path.rglob(".*"))
        path = newest(root)
        if path is not None:
            checkpoint = Checkpoint.open(path)
            assert checkpoint.verify() == []
            assert path == list(checkpoints(root).values())[-1]
            assert checkpoint.step >= last, "what was visible stays visible"
            written = state_sha256(_state(last).items(), step=checkpoint.step)
            found = checkpoint.state_sha256()
            assert found == (kept if checkpoint.step == last else written), "and is the state that was saved"
            kept = found
        else:
            assert last == 0
        sweep(root)
        remove(root, list(checkpoints(root))[:-1])
    assert seen_torn > 10, "the kills must have met saves in the middle"
    assert len(checkpoints(root)) == 1


def _state(seed: int) -> State:
    """What the saver that is started after step `seed` saves, at every step."""
    return random_state(SPECS, seed=seed)


def _fork_saver(root: str, last: int) -> int:
    """A process that saves one step after the other until it is killed; forked, so that 100 of them start quickly."""
    child = os.fork()
    if child == 0:
        atlas, state = atlas_of(SPECS, "1x2x1", layers=2), _state(last)
        while True:
            last += 1
            save(root, atlas, state, step=last)
            save(root, atlas, state, step=last)  # the same step again: replaced in one instant
    return child
