"""DCP directories: torch's own loader takes ours, whole and sharded; we take what torch saved."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop import dcp as interop_dcp
from framework.model import Decoder
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs
from tests.fault_tolerance.checkpoints.saving import State, free_port, load, random_state, save

ARGUMENTS = {"num_layers": 2, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 56}
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Checkpoint, State, Path]:
    """Whether its embeddings are tied, a checkpoint, the state in it, and its export."""
    root = tmp_path_factory.mktemp("exported")
    checkpoint, state = _checkpoint(root, request.param)
    interop_dcp.export(checkpoint, root / "dcp")
    return request.param, checkpoint, state, root / "dcp"


def _checkpoint(root: Path, tied: bool) -> tuple[Checkpoint, State]:
    specs = state_specs(Decoder(vocab_size=67, tie_embeddings=tied, **ARGUMENTS))
    state = random_state(specs)
    config = {
        "model": {"tie_embeddings": tied, **ARGUMENTS},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    }
    atlas = Atlas(specs, Layout(2, 2, 1), "1f1b", 2)
    return save(root, atlas, state, step=7, extra={"samples": 70, "config": config}), state


def _trained(tied: bool, steps: int = 1) -> tuple[Decoder, torch.optim.AdamW]:
    model = Decoder(vocab_size=67, tie_embeddings=tied, **ARGUMENTS)
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(torch.arange(20).reshape(2, 10)).square().mean().backward()
        optim.step()
        optim.zero_grad()
    return model, optim


def test_torch_loads_our_export_into_a_model_and_its_optimizer(exported: tuple[bool, Checkpoint, State, Path]) -> None:
    tied, _, state, theirs = exported
    model, optim = _trained(tied)
    theirs_model, theirs_optim = get_state_dict(model, optim, options=OPTIONS)
    wanted = {"model": theirs_model, "optim": theirs_optim}
    dcp.load(wanted, checkpoint_id=theirs, no_dist=True)
    set_state_dict(model, optim, model_state_dict=wanted["model"], optim_state_dict=wanted["optim"], options=OPTIONS)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), state[f"param/{name}"])
        for kind in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(optim.state[parameter][kind], state[f"{kind}/{name}"])
        assert optim.state[parameter]["step"] == 7
    assert optim.param_groups[0]["betas"] == (0.9, 0.95)


def test_an_export_comes_back_with_the_same_digest(tmp_path: Path, exported: tuple[bool, Checkpoint, State, Path]) -> None:
    _, checkpoint, _, theirs = exported
    back = interop_dcp.import_(theirs, str(tmp_path / "back" / "step_000007"))
    assert back.state_sha256() == checkpoint.state_sha256()
    assert set(back.specs) == set(checkpoint.specs)
    assert back.extra["samples"] == 70


def test_we_load_what_torch_saved(tmp_path: Path) -> None:
    model, optim = _trained(tied=False, steps=3)
    theirs_model, theirs_optim = get_state_dict(model, optim, options=OPTIONS)
    dcp.save({"model": theirs_model, "optim": theirs_optim}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = interop_dcp.import_(tmp_path / "dcp", str(tmp_path / "step_000003"))
    assert checkpoint.step == 3
    state = {f"param/{name}": p.detach().numpy() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{kind}/{name}": optim.state[parameter][kind].numpy() for kind in ("exp_avg", "exp_avg_sq")}
    load(checkpoint, Atlas(checkpoint.specs, Layout(1, 3, 2), "1f1b", 2), state)


def _fsdp_rank(rank: int, root: str, port: int) -> None:
    """Loads an export into a model sharded over two ranks, checks its shards, and saves it with DCP."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Decoder(vocab_size=67, **ARGUMENTS)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optim = torch.optim.AdamW(model.parameters())
    theirs_model, theirs_optim = get_state_dict(model, optim, options=OPTIONS)
    wanted = {"model": theirs_model, "optim": theirs_optim}
    dcp.load(wanted, checkpoint_id=f"{root}/dcp")
    set_state_dict(model, optim, model_state_dict=wanted["model"], optim_state_dict=wanted["optim"], options=OPTIONS)
    again_model, again_optim = get_state_dict(model, optim, options=OPTIONS)
    dcp.save({"model": again_model, "optim": again_optim}, checkpoint_id=f"{root}/sharded")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_job_loads_our_export_and_we_load_what_it_saves(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path, tied=False)
    interop_dcp.export(checkpoint, tmp_path / "dcp")
    torch.multiprocessing.spawn(_fsdp_rank, args=(str(tmp_path), free_port()), nprocs=2)
    back = interop_dcp.import_(tmp_path / "sharded", str(tmp_path / "back" / "step_000007"))
    assert back.state_sha256() == checkpoint.state_sha256()


class _Evil:
    def __reduce__(self):
        return os.system, ("echo pwned",)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"posix\.system is not let in"):
        interop_dcp.read(tmp_path)
    with pytest.raises(ValueError, match=r"without \.metadata"):
        interop_dcp.read(tmp_path / "nowhere")
