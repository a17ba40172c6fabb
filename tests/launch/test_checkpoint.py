"""`holdfast checkpoint`: what it prints, what it leaves, and its exit codes."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml

from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint
from fault_tolerance.checkpoints.shelf import checkpoints
from framework.model import Decoder
from launch import main as holdfast
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs
from tests.fault_tolerance.checkpoints.saving import load, random_state, save

ARGUMENTS = {
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 56,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
SPECS = state_specs(Decoder(vocab_size=67, **ARGUMENTS))
STATE = random_state(SPECS)
CONFIG = {"model": ARGUMENTS, "optim": {"lr": 1e-3}}


def _atlas(layout: str) -> Atlas:
    return Atlas(SPECS, Layout.parse(layout), "1f1b", 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 5, 10 and 15."""
    place = tmp_path_factory.mktemp("saved")
    for step, layout in ((5, "1x1x1"), (10, "2x2x1"), (15, "1x2x2")):
        extra = {"layout": layout, "samples": step * 8, "val_loss": 5.0 - (step == 10), "config": CONFIG}
        save(place, _atlas(layout), STATE, step=step, extra=extra)
    return place


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Path:
    """A run directory with these checkpoints, which the test may spoil."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"fault_tolerance": {"durable": {"dir": None}}}))
    return tmp_path


def _call(*arguments: object) -> int:
    return holdfast.main(["checkpoint", *map(str, arguments)])


def test_ls_names_every_checkpoint_and_what_was_never_committed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_000020").mkdir()
    assert _call("ls", run) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("step_000005", "2x2x1", "1x2x2", "not committed"))
    assert _call("ls", run / "nowhere") == 0
    assert "no checkpoints" in capsys.readouterr().out


def test_show_prints_state_tensors_and_digest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("show", run, "--tensors", "--digest") == 0
    out = capsys.readouterr().out
    assert "step 15" in out and "samples: 120" in out and "param/layers.1.ffn.down.weight  32x56  float32" in out
    assert Checkpoint.open(str(run / "checkpoints" / "step_000015")).state_sha256() in out
    assert _call("show", run / "checkpoints" / "step_000005", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5


def test_verify_exits_with_1_when_a_bit_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("verify", run, "--all") == 0
    assert capsys.readouterr().out.count("intact") == 3
    file = next((run / "checkpoints" / "step_000010").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert _call("verify", run) == 0
    assert _call("verify", run, "--all") == 1
    out = capsys.readouterr().out
    assert "step_000010: DAMAGED" in out and "1 of" in out and file.name in out


def test_diff_names_tensors_and_keys(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = run / "checkpoints"
    other = dict(STATE)
    other["param/norm.weight"] = STATE["param/norm.weight"].copy()
    other["param/norm.weight"][3] += 0.5
    save(run / "other", _atlas("2x1x1"), other, step=15, extra={"layout": "2x1x1", "samples": 1})
    assert _call("diff", shelf / "step_000005", shelf / "step_000005") == 0
    assert "equal" in capsys.readouterr().out
    assert _call("diff", shelf / "step_000015", run / "other") == 1
    out = capsys.readouterr().out
    assert "param/norm.weight: 1 elements differ, by 0.5 at most, at [3]" in out
    assert "extra.samples: 120 and 1" in out and "exp_avg" not in out
    assert _call("diff", shelf / "step_000005", shelf / "step_000010", "--tensors-only") == 0


@pytest.mark.parametrize("how", [("--layout", "2x1x2"), pytest.param(("--files", "3"), marks=pytest.mark.slow)])
def test_reshape_keeps_the_state(run: Path, how: tuple[str, str]) -> None:
    assert _call("reshape", run, run / "again", *how) == 0
    again = Checkpoint.open(str(run / "again" / "step_000015"))
    assert again.verify() == []
    assert len(again.index.shards) == (4 if how[0] == "--layout" else 3)
    load(again, _atlas("1x3x1"), STATE)


def test_prune_keeps_what_the_rules_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_000020").mkdir()
    assert _call("prune", run, "--keep-last", 1, "--keep-best", 1, "--dry-run") == 0
    assert len(checkpoints(str(run / "checkpoints"))) == 3
    assert "step 10: kept, among the lowest losses" in capsys.readouterr().out
    assert _call("prune", run, "--keep-last", 1, "--keep-best", 1) == 0
    assert list(checkpoints(str(run / "checkpoints"))) == [10, 15]
    assert (run / "checkpoints" / "step_000020").exists(), "the run may be writing it"
    assert _call("prune", run / "checkpoints", "--torn") == 0
    assert not (run / "checkpoints" / "step_000020").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dcp", "deepspeed", "ranks"])
def test_export_and_import_keep_the_digest(run: Path, kind: str) -> None:
    (run / "table.yaml").write_text(
        "degrees: {tp: 2}\npatterns: {'.*norm.weight': average, '(?!.*norm).*': shard(1)}\n"
    )
    more = ["--table", run / "table.yaml"] if kind == "ranks" else []
    assert _call("export", kind, run, run / "theirs", *more) == 0
    assert _call("export", kind, run, run / "theirs", *more) == 2, "the target is not empty any more"
    assert _call("import", kind, run / "theirs", run / "back") == 0
    a, b = (Checkpoint.open(str(path)) for path in (run / "checkpoints" / "step_000015", run / "back" / "step_000015"))
    assert a.state_sha256() == b.state_sha256()
    assert _call("import", kind, run / "theirs", run / "back") == 2, "the step is there already"


def test_export_and_import_of_weights_start_a_new_run(run: Path) -> None:
    assert _call("export", "huggingface", run, run / "theirs") == 0
    assert _call("import", "huggingface", run / "theirs", run / "back") == 0
    assert _call("diff", run / "checkpoints" / "step_000015", run / "back") == 1
    back = Checkpoint.open(str(run / "back" / "step_000000"))
    assert (back.read_tensor("param/head.weight") == STATE["param/head.weight"]).all()


def test_save_asks_a_run_and_may_wait_for_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("save", run) == 0
    assert (run / "control" / "checkpoint").is_file()

    def controller() -> None:
        time.sleep(0.3)
        save(run / "checkpoints", _atlas("1x1x1"), STATE, step=16)

    thread = threading.Thread(target=controller)
    thread.start()
    assert _call("save", run, "--wait", 30) == 0
    thread.join()
    assert "step_000016" in capsys.readouterr().out
    assert _call("save", run, "--wait", 0.3) == 1
    (run / "summary.json").write_text("{}")
    assert _call("save", run) == 2
    assert "has ended" in capsys.readouterr().err


def test_bad_requests_are_one_line_and_exit_code_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (("show", run / "nowhere"), "must be a checkpoint"),
        (("verify", run / "logs"), f"got no {INDEX} there"),
        (("reshape", run, run / "x", "--layout", "2x2"), "must read like 2x2x1"),
        (("reshape", run, run / "x", "--files", 0), "files must be at least 1"),
        (("prune", run, "--keep-last", 0), "keep_last must be at least 1"),
        (("import", "dcp", run, run / "x"), "must be a DCP directory"),
        (("import", "huggingface", run, run / "x"), "no config.json"),
        (("import", "deepspeed", run, run / "x"), "must be a DeepSpeed universal"),
        (("save", run / "nowhere"), "must be a run directory"),
        (("export", "ranks", run, run / "x"), "must be given --table"),
    ):
        assert _call(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    assert _call("export", "gguf", run, run / "x") == 2
