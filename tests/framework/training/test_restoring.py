"""Restoring from a checkpoint: what is on the host at once, what is on a device in parts that pass through the host."""

import numpy as np
import pytest
import torch

from fault_tolerance.checkpoints.checkpoint import Checkpoint, commit
from fault_tolerance.checkpoints.shard import write_shard
from framework.training import restoring
from parallel.atlas import Piece
from tests.fault_tolerance.snapshots.vaults import atlas_of, shards, whole_state
from tests.gpu import needs_gpu


@pytest.fixture
def saved(tmp_path):
    atlas = atlas_of("1x1x1")
    state = whole_state(atlas, 1)
    pieces = shards(atlas, 0, state)
    entry = write_shard(str(tmp_path), "all", pieces.items(), specs=atlas.specs)
    commit(str(tmp_path), [entry], specs=atlas.specs, extra={"step": 3})
    return Checkpoint.open(str(tmp_path)), pieces


def filled(checkpoint, pieces, device):
    into = {piece: torch.empty(tensor.shape, device=device) for piece, tensor in pieces.items()}
    parts = list(restoring._parts(into))
    read = sum(restoring._read(checkpoint, part) for part in parts)
    return into, parts, read


def test_what_is_on_the_host_is_read_at_once(saved):
    into, parts, read = filled(*saved, "cpu")
    assert len([part for part in parts if part]) == 1 and read > 0
    assert all(np.array_equal(into[p].numpy().view(np.int32), t.numpy().view(np.int32)) for p, t in saved[1].items())


def test_what_is_on_a_device_is_read_in_parts_of_bounded_size(saved, monkeypatch):
    monkeypatch.setattr(restoring, "PART_BYTES", 20_000)
    into = {piece: torch.empty(tensor.shape, device="meta") for piece, tensor in saved[1].items()}
    parts = [part for part in restoring._parts(into) if part]
    assert [piece for part in parts for piece in part] == list(into) and len(parts) > 3
    largest = max(tensor.nbytes for tensor in into.values())
    assert all(sum(tensor.nbytes for tensor in part.values()) < 20_000 + largest for part in parts)
    assert isinstance(next(iter(parts[0])), Piece)


@needs_gpu
def test_a_checkpoint_is_read_onto_a_gpu(saved, monkeypatch):
    """Only memory of the host can be read into: `resume=` could not work on a GPU at all."""
    monkeypatch.setattr(restoring, "PART_BYTES", 20_000)
    into, _, _ = filled(*saved, "cuda")
    assert all(torch.equal(into[p].cpu().view(torch.int32), t.view(torch.int32)) for p, t in saved[1].items())
