"""Hugging Face folders: transformers loads ours and gives the same logits; we load theirs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop import huggingface as hf
from framework.model import Decoder
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs
from tests.fault_tolerance.checkpoints.saving import load, random_state, save

ARGUMENTS = {
    "num_layers": 3,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 56,
    "rope_theta": 5000.0,
    "norm_eps": 1e-5,
}


def _checkpoint(root: Path, tied: bool) -> tuple[Checkpoint, Decoder]:
    model = Decoder(vocab_size=67, tie_embeddings=tied, **ARGUMENTS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    atlas = Atlas(state_specs(model), Layout(2, 2, 1), "1f1b", 3)
    state = random_state(atlas.specs)
    state |= {f"param/{name}": parameter.detach().numpy() for name, parameter in model.named_parameters()}
    config = {
        "model": {"_target_": "framework.model.Decoder", "tie_embeddings": tied, **ARGUMENTS},
        "data": {"seq_len": 64},
    }
    return save(root, atlas, state, step=7, extra={"config": config}), model


def test_every_name_goes_there_and_back() -> None:
    for name, _ in Decoder(vocab_size=8, tie_embeddings=False, **ARGUMENTS).named_parameters():
        assert hf.ours(hf.theirs(name)) == name
    with pytest.raises(ValueError, match="must be a parameter of a Llama-like model"):
        hf.theirs("layers.0.gate.weight")
    with pytest.raises(ValueError, match="without biases"):
        hf.ours("model.layers.0.self_attn.q_proj.bias")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_our_export_and_gives_the_same_logits(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    if not tied:
        monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    checkpoint, model = _checkpoint(tmp_path, tied)
    hf.export(checkpoint, tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) is not tied
    llama, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(67, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(llama.eval()(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_we_load_what_transformers_saved_and_give_the_same_logits(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 7000.0},
        tie_word_embeddings=tied,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    checkpoint = hf.import_(tmp_path / "hf", str(tmp_path / "step_000000"))
    arguments = {k: v for k, v in checkpoint.extra["config"]["model"].items() if k != "_target_"}
    assert arguments["rope_theta"] == 7000.0
    model = Decoder(**arguments)
    state = {name: torch.from_numpy(checkpoint.read_tensor(f"param/{name}")) for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=not tied)
    tokens = torch.randint(67, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not checkpoint.read_tensor("exp_avg/norm.weight").any()


def test_an_imported_state_has_the_specs_of_the_model_and_loads_on_any_layout(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path, tied=True)
    hf.export(checkpoint, tmp_path / "hf", dtype="bfloat16")
    back = hf.import_(tmp_path / "hf", str(tmp_path / "back" / "step_000000"))
    assert set(back.specs) == set(checkpoint.specs)
    state = {s.name: back.read_tensor(s.name) for s in back.specs}
    before = checkpoint.read_tensor("param/norm.weight")
    np.testing.assert_allclose(state["param/norm.weight"], before, rtol=1e-2)
    load(back, Atlas(back.specs, Layout(1, 2, 2), "1f1b", 3), state)


def test_models_that_ours_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path, tied=False)
    hf.export(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value, match in (
        ("attention_bias", True, "attention_bias must be False"),
        ("head_dim", 64, "head_dim must be 8"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type must be default"),
        ("model_type", "gpt2", "model_type must be llama or mistral"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=match):
            hf.read(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"no config\.json"):
        hf.read(tmp_path)
