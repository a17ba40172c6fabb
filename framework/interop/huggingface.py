"""Interop with Hugging Face: folders of Llama-family weights, `config.json` and `*.safetensors`, both ways.

    ours                               theirs
    embed.weight                       model.embed_tokens.weight
    layers.N.attention.wq.weight       model.layers.N.self_attn.q_proj.weight       (and k, v; wo is o_proj)
    layers.N.ffn.gate.weight           model.layers.N.mlp.gate_proj.weight          (and up, down)
    head.weight                        lm_head.weight, absent when tied

Both sides rotate the halves of a head (RoPE), so no weight is permuted. Weights alone: an import starts a new run, at
step 0 with zero moments; an export leaves the moments behind.

Rule of this file: a tensor that the table does not name is an error, never skipped: it would be another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop.exchange import (
    Foreign,
    Lazy,
    Progress,
    is_tied,
    model_arguments,
    parameters,
    silent,
    store,
    whole_tensor,
)

TABLE = {  # ours: theirs; N stands for the number of a layer
    "embed.weight": "model.embed_tokens.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.N.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "layers.N.ffn.gate.weight": "model.layers.N.mlp.gate_proj.weight",
    "layers.N.ffn.up.weight": "model.layers.N.mlp.up_proj.weight",
    "layers.N.ffn.down.weight": "model.layers.N.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BACK = {theirs: ours for ours, theirs in TABLE.items()}
SHARD_BYTES = 4 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # a function of the config that old files carry


def theirs(name: str) -> str:
    """The Hugging Face name of one of our parameters. Raises ValueError for a parameter that Llama has not."""
    found = _translate(name, TABLE)
    if found is None:
        raise ValueError(f"export: {name} must be a parameter of a Llama-like model; export it as dcp instead")
    return found


def ours(name: str) -> str:
    """Our name of a Hugging Face Llama tensor. Raises ValueError for a tensor that our model has not."""
    found = _translate(name, _BACK)
    if found is None:
        raise ValueError(f"import: {name} must be a tensor of a Llama model without biases; this model is another one")
    return found


def export(checkpoint: Checkpoint, directory: Path, *, dtype: str = "float32", progress: Progress = silent) -> None:
    """Write weights and config as a folder that `LlamaForCausalLM.from_pretrained` takes.

    Raises ValueError if the checkpoint is of another model, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    names = {theirs(name): f"param/{name}" for name in parameters(checkpoint)}
    config = _config(checkpoint, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(checkpoint, names, DTYPES[dtype].itemsize))
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in part:
            tensors[name] = whole_tensor(checkpoint, names[name]).to(DTYPES[dtype])
            progress(math.prod(checkpoint.index.by_name[names[name]].shape) * 4)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if len(parts) > 1:
        table = {
            "metadata": {"total_size": sum((directory / file).stat().st_size for file in set(places.values()))},
            "weight_map": places,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(table, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read(directory: Path) -> Foreign:
    """A folder of Llama weights in our terms. Raises ValueError for what our model cannot be."""
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"import: {directory} must hold config.json and *.safetensors, got no config.json")
    config = json.loads(file.read_text())
    arguments = _arguments(config)
    tensors = {}
    for name, lazy in _tensors(directory):
        if _IGNORED.fullmatch(name) or (name == "lm_head.weight" and arguments["tie_embeddings"]):
            continue
        tensors[f"param/{ours(name)}"] = lazy
    if "param/embed.weight" not in tensors:
        raise ValueError(f"import: {directory} must hold *.safetensors with model.embed_tokens.weight, got none")
    model = {"_target_": "framework.model.Decoder", **arguments}
    origin = {"format": "huggingface", "path": str(directory)}
    return Foreign(tensors, {"step": 0, "samples": 0, "config": {"model": model}, "imported": origin})


def import_(directory: Path, target: str, *, progress: Progress = silent) -> Checkpoint:
    """Make a durable checkpoint of a folder of Llama weights, at step 0. Raises ValueError as `read` does."""
    return store(read(directory), target, progress=progress)


def _config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    model = model_arguments(checkpoint)
    data = checkpoint.extra["config"].get("data", {})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model["vocab_size"],
        "hidden_size": model["dim"],
        "intermediate_size": model["ffn_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["dim"] // model["num_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": data.get("seq_len", 2048),
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_theta"]},
        "tie_word_embeddings": is_tied(checkpoint),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our model's arguments from theirs."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rope = {**config.get("rope_parameters", {}), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for what, must, got in (
        ("model_type", ("llama", "mistral"), config.get("model_type")),
        ("hidden_act", ("silu",), config.get("hidden_act", "silu")),
        ("head_dim", (dim // heads,), config.get("head_dim") or dim // heads),
        ("rope_type", ("default",), kind),
        ("attention_bias", (False,), config.get("attention_bias", False)),
    ):
        if got not in must:
            raise ValueError(f"import: {what} must be {' or '.join(map(str, must))} for our model, got {got}")
    return {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "ffn_dim": config["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _tensors(directory: Path) -> Iterator[tuple[str, Lazy]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - it is no mapping
                yield name, Lazy(tuple(reader.get_slice(name).get_shape()), _reader(file, name))


def _reader(file: Path, name: str) -> Any:
    def read() -> Tensor:
        with safe_open(file, "pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        return tensor

    return read


def _parts(checkpoint: Checkpoint, names: dict[str, str], width: int) -> Iterator[list[str]]:
    """The names in files of about 4 GiB."""
    part: list[str] = []
    size = 0
    for name, own in names.items():
        bytes_ = width * math.prod(checkpoint.index.by_name[own].shape)
        if part and size + bytes_ > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += bytes_
    yield part


def _translate(name: str, table: dict[str, str]) -> str | None:
    number = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    layer = number.group() if number is not None else "N"
    found = table.get(name if number is None else f"{name[: number.start()]}N{name[number.end() :]}")
    return None if found is None else found.replace(".N.", f".{layer}.")
