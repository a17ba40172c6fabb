"""Recording never stands in the way of training: without an extension, without a ring, or with one that comes late."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fault_tolerance.detection.rings import Rings
from framework.training.recording import Recording
from parallel import recorder_build
from parallel.native import BuildError
from parallel.record import Op, Phase, decode
from parallel.recorder_build import load


def test_without_a_compiler_the_run_is_told_once_and_goes_on(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    told: list[str] = []
    recording = Recording("/nowhere", rank=0, generation=1, tell=told.append)
    recording.mark(1, "forward")
    recording.abort()
    assert not recording.on and not recording.ready()
    assert len(told) == 1 and "no-such-compiler" in told[0]


def test_a_ring_that_cannot_be_opened_is_no_error(tmp_path) -> None:
    _built()
    told: list[str] = []
    recording = Recording(str(tmp_path / "gone"), rank=0, generation=1, tell=told.append)
    assert not recording.on and not recording.ready() and "FileNotFoundError" in told[0]


def test_a_build_that_comes_late_is_taken_up_by_the_groups_that_exist(monkeypatch, tmp_path) -> None:
    _built()
    real = recorder_build.library()
    late = tmp_path / "late.so"
    monkeypatch.setattr("framework.training.recording.library", lambda: late)
    rings, told = Rings(), list[str]()
    recording = Recording(rings.lend(1, [0])[0], rank=0, generation=1, tell=told.append)
    assert not recording.on and not recording.ready() and "being built" in told[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(2))
        late.symlink_to(real)
        assert recording.ready()
        recording.begin()
        recording.mark(4, "forward")
        recording.mark(4, "optimizer")  # a part of the step: no mark of its own
        dist.all_reduce(torch.ones(2))
        seen = decode(rings.read(1)[0])
        assert [r.op for r in seen.records] == [Op.MARK, Op.ALLREDUCE]
        assert (seen.step, seen.phase, recording.on, recording.ready()) == (4, Phase.TRAIN, True, False)
        assert "every collective is recorded" in told[-1]
    finally:
        dist.destroy_process_group()
        recording.close()
        rings.close()


def test_ranks_of_other_machines_wait_for_one_that_has_just_joined_and_still_builds(monkeypatch, tmp_path) -> None:
    """A machine joined a run that recorded. Its rank had no recorder yet, the others began without it, and since those that
    record already never said again that they could begin, it stayed out for good: whoever hung, it was blamed for not coming.
    """
    _built()
    rings, told = Rings(), list[str]()
    recording = Recording(rings.lend(1, [0])[0], rank=0, generation=1, at_once=False, tell=told.append)
    try:
        assert not recording.on and recording.ready() and "every machine" in told[0]
        assert recording.begin() and not recording.ready()
    finally:
        recording.close()
        rings.close()


def _built() -> None:
    try:
        load()
    except BuildError as error:
        pytest.skip(str(error))
