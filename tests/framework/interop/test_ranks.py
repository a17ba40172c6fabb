"""Files by rank and table: any cut that the table can say comes back as it was; a wrong table does not."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop import ranks as interop_ranks
from tests.fault_tolerance.checkpoints.saving import atlas_of, decoder_specs, random_state, save

TABLE = {
    "degrees": {"pp": 2, "dp": 2, "tp": 2},
    "patterns": {
        r"(embed|head)\.weight": "pad(0, 128) shard(0)",
        r".*norm\.weight|scale": "replicate",
        r".*\.wq\.weight": "fused(0, 24, 12, 12)",
        r".*\.wk\.weight": "shard(0) fragment",
        r".*\.(wo|down)\.weight": "shard(1)",
        r".*\.up\.weight": "expert(0) shard(1)",
    },
    "stages": {"embed.weight": [0], "head.weight": [1]},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A checkpoint and the files made of it, which are only read."""
    root = tmp_path_factory.mktemp("exported")
    specs = decoder_specs(layers=2)
    checkpoint = save(root, atlas_of(specs, "1x2x1", layers=2), random_state(specs), step=3, extra={"samples": 5})
    (root / "table.yaml").write_text(yaml.safe_dump(TABLE))
    interop_ranks.export(checkpoint, root / "ranks", table=root / "table.yaml")
    return checkpoint, root / "ranks"


@pytest.fixture
def ranks(tmp_path: Path, exported: tuple[Checkpoint, Path]) -> Path:
    """These files, for a test that spoils them."""
    return Path(shutil.copytree(exported[1], tmp_path / "ranks"))


def test_a_state_comes_back_from_the_files_of_another_program(tmp_path: Path, exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, theirs = exported
    parts = load_file(theirs / "pp0_dp1_tp0_ep0.safetensors")
    assert parts["param/embed.weight"].shape == (128, 48)
    assert parts["param/layers.0.attention.wk.weight"].shape == (12 * 48 // 2,)
    assert "param/head.weight" not in parts
    back = interop_ranks.import_(theirs, str(tmp_path / "back" / "step_000003"))
    assert back.state_sha256() == checkpoint.state_sha256()
    assert back.extra["samples"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        (r".*\.wq\.weight", "fused(0, 12, 24, 12)"),
        (r".*\.wq\.weight", "shard(0)"),
        (r".*\.wk\.weight", "shard(1) fragment"),
        (r"(embed|head)\.weight", "pad(1, 64) shard(1)"),
        (r".*\.(wo|down)\.weight", "shard(0)"),
        (r".*norm\.weight|scale", "average"),
    ],
)
def test_a_mutated_table_changes_the_digest_or_is_refused(
    tmp_path: Path, exported: tuple[Checkpoint, Path], ranks: Path, pattern: str, wrong: str
) -> None:
    checkpoint, _ = exported
    file = ranks / "ranks.yaml"
    plain = yaml.safe_load(file.read_text())
    plain["patterns"][pattern] = wrong
    file.write_text(yaml.safe_dump(plain))
    if wrong == "average":  # equal copies average to themselves: drift is what tells the two apart
        one = ranks / "pp0_dp0_tp1_ep0.safetensors"
        tensors = load_file(one)
        tensors["param/layers.0.attention_norm.weight"] += 1.0
        save_file(tensors, one)
    try:
        back = interop_ranks.import_(ranks, str(tmp_path / "back" / "step_000003"))
    except ValueError:
        return
    assert back.state_sha256() != checkpoint.state_sha256()


def test_a_rank_that_went_astray_is_named(tmp_path: Path, ranks: Path) -> None:
    one = ranks / "pp1_dp0_tp1_ep0.safetensors"
    tensors = load_file(one)
    tensors["param/layers.1.attention_norm.weight"][0] = torch.nan
    save_file(tensors, one)
    with pytest.raises(ValueError, match=r"copies of param/layers\.1\.attention_norm\.weight must be equal"):
        interop_ranks.import_(ranks, str(tmp_path / "back" / "step_000003"))
    one.unlink()
    with pytest.raises(ValueError, match="must be there, one for every rank"):
        interop_ranks.read(ranks)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        interop_ranks.read(tmp_path)
    (tmp_path / "ranks.yaml").write_text("patterns: {x: replicate}\ndegree: 2\n")
    with pytest.raises(ValueError, match="may have degrees"):
        interop_ranks.read(tmp_path)
