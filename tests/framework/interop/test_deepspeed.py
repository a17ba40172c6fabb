"""DeepSpeed's universal checkpoints: a real engine loads ours, whatever its stage; we take what its converter made."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop import deepspeed as ds
from framework.model import Decoder
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs
from tests.fault_tolerance.checkpoints.saving import State, free_port, load, random_state, save

MODEL = {"vocab_size": 67, "num_layers": 2, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 56}
ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def _checkpoint(root: Path) -> tuple[Checkpoint, State]:
    """A state that training may go on from: small weights, and second moments that are not negative."""
    specs = state_specs(Decoder(**MODEL))
    state = {name: 0.05 * values for name, values in random_state(specs).items()}
    state |= {name: np.abs(values) for name, values in state.items() if name.startswith("exp_avg_sq")}
    atlas = Atlas(specs, Layout(2, 2, 1), "1f1b", 2)
    return save(root, atlas, state, step=7, extra={"samples": 28, "config": {"model": MODEL}}), state


def _run(world: int, stage: int, **job: Any) -> dict[str, Any]:
    """The job on real ranks, each a process; what rank 0 wrote."""
    port, deadline = free_port(), time.monotonic() + 500
    job = {"model": MODEL, "steps": 0, **job}
    command = [sys.executable, str(Path(__file__).with_name("deepspeed_job.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [Path(f"{job['out']}.{rank}.log") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(stage), json.dumps(job)],
            env=environment,
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    failed = [log.read_text()[-3000:] for rank, log in zip(ranks, logs, strict=True) if rank.returncode > 0]
    assert not failed, failed[0]
    return torch.load(job["out"], weights_only=False)


def _torch_losses(state: State, step: int, steps: int) -> list[float]:
    """The same steps by plain torch from the same state: the truth."""
    model = Decoder(**MODEL)
    model.load_state_dict({n: torch.from_numpy(state[f"param/{n}"]) for n, _ in model.named_parameters()})
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for name, parameter in model.named_parameters():
        moments = {kind: torch.from_numpy(state[f"{kind}/{name}"].copy()) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    losses = []
    for number in range(steps):
        tokens = torch.randint(67, (4, 17), generator=torch.Generator().manual_seed(number))
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 2)])
def test_an_engine_of_any_stage_loads_our_export_and_trains_on(tmp_path: Path, stage: int, world: int) -> None:
    checkpoint, state = _checkpoint(tmp_path)
    ds.export(checkpoint, tmp_path / "theirs")
    out = _run(world, stage, load=str(tmp_path / "theirs"), steps=3, out=str(tmp_path / "out.pt"))
    for name, values in state.items():
        np.testing.assert_array_equal(out["loaded"][name], values, err_msg=name)
    assert out["global_steps"] == 7
    assert json.loads(out["client"]["holdfast_extra"])["samples"] == 28
    assert out["groups"] == [(1e-3, 0.1), (1e-3, 0.0)], "the engine keeps the rates and decays of its own groups"
    np.testing.assert_allclose(out["losses"], _torch_losses(state, 7, 3), rtol=1e-5)


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (3, 1)])
def test_we_take_what_their_converter_made_of_a_real_run(tmp_path: Path, stage: int, world: int) -> None:
    out = _run(world, stage, steps=3, save=str(tmp_path / "run"), out=str(tmp_path / "out.pt"))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(tmp_path / "run" / "global_step3"), "--output_folder", str(tmp_path / "universal")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run([*command, *folders, *workers], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = ds.import_(tmp_path / "universal", str(tmp_path / "step_000003"))
    assert checkpoint.step == 3
    assert checkpoint.extra["samples"] == 12
    state = {name: tensor.numpy() for name, tensor in out["saved"].items()}
    load(checkpoint, Atlas(checkpoint.specs, Layout(2, 1, 2), "1f1b", 2), state)


def test_an_export_comes_back_with_the_same_digest(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path)
    ds.export(checkpoint, tmp_path / "theirs")
    for place in (tmp_path / "theirs", tmp_path / "theirs" / "global_step7_universal"):
        back = ds.import_(place, str(tmp_path / "back" / place.name))
        assert back.state_sha256() == checkpoint.state_sha256()
        assert set(back.specs) == set(checkpoint.specs)
        assert back.extra["config"] == {"model": MODEL}


class _Evil:
    def __reduce__(self):
        return os.system, ("echo pwned",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path)
    ds.export(checkpoint, tmp_path / "theirs")
    victim = tmp_path / "theirs" / "global_step7_universal" / "zero" / "norm.weight" / "fp32.pt"
    torch.save({"param": _Evil()}, victim)
    with pytest.raises(ValueError, match="must hold tensors and plain values only"):
        ds.read(tmp_path / "theirs")
    victim.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match="must hold tensors and plain values only"):
        ds.read(tmp_path / "theirs")
    victim.write_bytes(b"torn")
    with pytest.raises(ValueError, match="must hold tensors and plain values only"):
        ds.read(tmp_path / "theirs")
