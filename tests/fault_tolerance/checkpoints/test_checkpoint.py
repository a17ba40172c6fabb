"""Durable checkpoints: any layout's save is any layout's load; damage is found; what is torn is not taken."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint, commit
from fault_tolerance.checkpoints.shard import write_shard
from fault_tolerance.checkpoints.storage import StorageError
from fault_tolerance.checkpoints.verify import DamageError
from fault_tolerance.digest import state_sha256
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box
from tests.fault_tolerance.checkpoints.saving import atlas_of, cut, decoder_specs, load, random_state, save

LAYOUTS = [
    "1x1x1",
    "1x2x1",
    "1x1x2",
    "2x1x1",
    "2x2x2",
    "1x3x2",
    "4x1x1",
    "1x1x4",
    "2x3x1",
    "1x5x1",
    "4x2x2",
    "3x1x3",
    "1x8x1",
]


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_loads_what_any_layout_saved(tmp_path: Path, source: str) -> None:
    specs = decoder_specs(dim=24, kv_dim=12, ffn_dim=50, vocab=67, tied=LAYOUTS.index(source) % 2 == 1)
    state = random_state(specs)
    save(tmp_path, atlas_of(specs, source), state)
    checkpoint = Checkpoint.open(str(tmp_path / "step_000001"))
    assert checkpoint.state_sha256() == state_sha256(state.items(), step=1)
    for target in LAYOUTS:
        load(checkpoint, atlas_of(specs, target), state)


def test_other_schedules_hold_other_boxes_and_load_as_well(tmp_path: Path) -> None:
    specs = decoder_specs()
    state = random_state(specs)
    checkpoint = save(tmp_path, atlas_of(specs, "2x2x1", "zbv_zero_bubble"), state)
    load(checkpoint, atlas_of(specs, "2x1x2", "interleaved_1f1b"), state)


@pytest.mark.slow
def test_bytes_read_are_within_two_percent_of_bytes_needed(tmp_path: Path) -> None:
    specs = decoder_specs(dim=384, kv_dim=192, ffn_dim=1024, vocab=259, layers=2)
    state = random_state(specs)
    for source, target in itertools.product(["1x1x1", "2x2x1", "1x3x2"], ["1x1x1", "1x2x2", "1x3x1", "1x7x1", "2x1x4"]):
        checkpoint = save(tmp_path, atlas_of(specs, source, layers=2), state)
        stats = load(checkpoint, atlas_of(specs, target, layers=2), state)
        assert stats.bytes_read <= 1.02 * stats.bytes_needed, (source, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    spec = TensorSpec("param/x", (5, 7, 3), name, 1, (0,))
    values = torch.arange(105).reshape(5, 7, 3).remainder(2).to(dtype)
    box = Box.whole(spec.shape)
    entry = write_shard(str(tmp_path / "step_000001"), "a", [(Piece("param/x", box), values)], specs=[spec])
    checkpoint = commit(str(tmp_path / "step_000001"), [entry], specs=[spec], extra={"step": 1})
    part = Piece("param/x", Box((1, 2, 1), (4, 6, 3)))
    out = torch.empty(3, 4, 2, dtype=dtype)
    checkpoint.read_into({part: out})
    assert torch.equal(out, values[1:4, 2:6, 1:3])


def test_buffers_may_be_functions_called_one_at_a_time(tmp_path: Path) -> None:
    specs = decoder_specs()
    state, atlas = random_state(specs), atlas_of(specs, "1x1x1")
    alive: list[str] = []

    def of(piece: Piece):  # noqa: ANN202
        def give() -> memoryview:
            alive.append(piece.tensor)
            return memoryview(state[piece.tensor].tobytes())

        return give

    entry = write_shard(str(tmp_path / "step_000001"), "a", [(p, of(p)) for p in atlas.owned(0)], specs=specs)
    assert alive == [piece.tensor for piece in atlas.owned(0)]
    load(commit(str(tmp_path / "step_000001"), [entry], specs=specs, extra={"step": 1}), atlas, state)


def test_shards_are_plain_safetensors_files(tmp_path: Path) -> None:
    specs = decoder_specs()
    state = random_state(specs)
    save(tmp_path, atlas_of(specs, "2x1x2"), state)
    seen = 0
    for file in sorted((tmp_path / "step_000001").glob("*.safetensors")):
        with safe_open(file, "np") as reader:
            for name in set(reader.keys()) - {"__hashes__", "__pad__"}:
                tensor, _, corner = name.removesuffix("]").rpartition("[")
                slices = tuple(slice(*map(int, part.split(":"))) for part in corner.split(",") if part)
                np.testing.assert_array_equal(reader.get_tensor(name), state[tensor][slices])
                seen += reader.get_tensor(name).size
    assert seen == sum(array.size for array in state.values())


def test_nothing_is_pickled(tmp_path: Path) -> None:
    specs = decoder_specs()
    save(tmp_path, atlas_of(specs, "1x2x1"), random_state(specs), extra={"samples": 640, "rng": [1, 2]})
    index = json.loads((tmp_path / "step_000001" / INDEX).read_text())
    assert index["extra"].pop("saved_at") > 1.7e9
    assert index["extra"] == {"step": 1, "samples": 640, "rng": [1, 2]}
    assert {p.suffix for p in (tmp_path / "step_000001").iterdir()} == {".safetensors", ".json"}


@pytest.mark.slow
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    specs = decoder_specs(dim=16, kv_dim=8, ffn_dim=20, vocab=11, layers=1)
    save(tmp_path, atlas_of(specs, "1x2x1", layers=1), random_state(specs))
    directory = tmp_path / "step_000001"
    assert Checkpoint.open(str(directory)).verify() == []
    rng = np.random.default_rng(0)
    for file in sorted(directory.iterdir()):
        original = file.read_bytes()
        for at in rng.choice(len(original), 150, replace=False):
            changed = bytearray(original)
            changed[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            try:
                found = Checkpoint.open(str(directory)).verify()
            except ValueError:
                found = ["the index"]
            assert found, (file.name, at)
        file.write_bytes(original)


def test_a_load_refuses_damaged_units_and_reads_around_others(tmp_path: Path) -> None:
    specs = decoder_specs()
    state = random_state(specs)
    checkpoint = save(tmp_path, atlas_of(specs, "1x1x1"), state)
    (shard,) = checkpoint.index.shards
    extent = next(e for e in shard.extents if e.tensor == "param/layers.1.ffn.up.weight")
    path = tmp_path / "step_000001" / shard.file
    data = bytearray(path.read_bytes())
    data[extent.offset + 5] ^= 4
    path.write_bytes(data)
    damaged = Piece(extent.tensor, extent.box)
    with pytest.raises(DamageError, match=r"layers\.1\.ffn\.up\.weight: 1 of \d+ units have a wrong hash") as caught:
        Checkpoint.open(checkpoint.path).read_into({damaged: np.empty(extent.box.shape, "f4")})
    assert caught.value.damages[0].tensor == extent.tensor
    far = Piece(extent.tensor, Box((90, 0), (100, 48)))
    out = np.empty((10, 48), "f4")
    Checkpoint.open(checkpoint.path).read_into({far: out})
    np.testing.assert_array_equal(out, cut(state[extent.tensor], far.box))


def test_a_truncated_or_missing_shard_is_damage_not_data(tmp_path: Path) -> None:
    specs = decoder_specs()
    state = random_state(specs)
    checkpoint = save(tmp_path, atlas_of(specs, "1x2x1"), state)
    first, second = (tmp_path / "step_000001" / shard.file for shard in checkpoint.index.shards)
    first.write_bytes(first.read_bytes()[:-100_000])
    second.unlink()
    assert len(Checkpoint.open(checkpoint.path).verify()) == 2
    with pytest.raises(StorageError):
        load(Checkpoint.open(checkpoint.path), atlas_of(specs, "1x1x1"), state)


def test_commit_refuses_what_does_not_tile_the_state(tmp_path: Path) -> None:
    specs, directory = decoder_specs(), str(tmp_path / "step_000001")
    state, atlas = random_state(specs), atlas_of(specs, "1x2x1")

    def shard(pieces: list[Piece]):  # noqa: ANN202
        return write_shard(directory, "x", [(p, cut(state[p.tensor], p.box)) for p in pieces], specs=specs)

    first, second = (shard(list(atlas.owned(rank))) for rank in range(2))
    with pytest.raises(ValueError, match="must cover"):
        commit(directory, [first], specs=specs, extra={"step": 1})
    with pytest.raises(ValueError, match="must cover"):
        commit(directory, [first, second, second], specs=specs, extra={"step": 1})
    piece = atlas.owned(0)[0]
    shifted = Piece(piece.tensor, piece.box.cut(0, 1, piece.box.shape[0] + 1))
    with pytest.raises(ValueError, match="overlap"):
        commit(directory, [shard([shifted, *atlas.owned(0)[1:]]), second], specs=specs, extra={"step": 1})
    with pytest.raises(ValueError, match=r"extra\.step"):
        commit(directory, [first, second], specs=specs, extra={})
    Path(directory, first.file).unlink()
    with pytest.raises(StorageError, match="must have"):
        commit(directory, [first, second], specs=specs, extra={"step": 1})
    assert not Path(directory, INDEX).exists()


def test_saving_a_step_again_replaces_it_and_leaves_no_file_behind(tmp_path: Path) -> None:
    specs = decoder_specs()
    save(tmp_path, atlas_of(specs, "2x1x2"), random_state(specs, seed=1))
    state = random_state(specs, seed=2)
    checkpoint = save(tmp_path, atlas_of(specs, "1x2x1"), state)
    load(checkpoint, atlas_of(specs, "1x1x1"), state)
    assert len(list((tmp_path / "step_000001").iterdir())) == 3


def test_wrong_requests_are_the_callers_fault(tmp_path: Path) -> None:
    specs = decoder_specs()
    checkpoint = save(tmp_path, atlas_of(specs, "1x1x1"), random_state(specs))
    piece = checkpoint.pieces[0]
    with pytest.raises(ValueError, match="no tensor 'param/foreign'"):
        checkpoint.read_into({Piece("param/foreign", Box((0,), (1,))): np.empty(1)})
    with pytest.raises(ValueError, match="has no box"):
        checkpoint.read_into({Piece(piece.tensor, Box((0, 0), (999, 1))): np.empty(999, "f4")})
    with pytest.raises(ValueError, match="bytes for float32"):
        checkpoint.read_into({piece: np.empty(3, "f4")})
    with pytest.raises(ValueError, match="contiguous"):
        checkpoint.read_into({piece: torch.empty(piece.box.shape[::-1]).t()})
    with pytest.raises(StorageError, match="must exist"):
        Checkpoint.open(str(tmp_path / "nowhere"))
