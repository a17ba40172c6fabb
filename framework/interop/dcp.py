"""Interop with torch.distributed.checkpoint (DCP) directories, both ways.

    ours                  theirs: the names of torch's `get_state_dict`, flattened
    param/W               model.W
    exp_avg/W             optim.state.W.exp_avg
    exp_avg_sq/W          optim.state.W.exp_avg_sq
    the step              optim.state.W.step
    -                     optim.param_groups.W.{lr, betas, eps, weight_decay, ...}
    the rest              holdfast.extra, JSON in a tensor of bytes

so a plain `dcp.load` into a model and its AdamW finds every key it asks for. Tensors stream through the planner, one
at a time, in both directions. DCP's own metadata is a pickle: it is read by a restricted unpickler.

Rule of this file: DCP's own reader and writer touch its files; names are all that is known here.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from framework.interop.exchange import Foreign, Lazy, Progress, is_tied, parameters, silent, store, whole_tensor
from framework.interop.unpickling import load_pickle

EXTRA = "holdfast.extra"
MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIM = re.compile(r"(?:optim|optimizer|optimizers)\.state\.(.+)\.(exp_avg|exp_avg_sq|step)")
_MODEL = re.compile(r"(?:model\.)?(.+)")
_METADATA_NAMES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip


def export(checkpoint: Checkpoint, directory: Path, *, progress: Progress = silent) -> None:
    """Write a DCP directory of the whole state, that `dcp.load` takes for a model and its AdamW."""
    sources = _sources(checkpoint)
    state: dict[str, Any] = {theirs: torch.empty(shape, device="meta") for theirs, (_, shape) in sources.items()}
    step = torch.tensor(float(checkpoint.step))
    extra = torch.frombuffer(bytearray(json.dumps(checkpoint.extra).encode()), dtype=torch.uint8)
    state |= {f"optim.state.{name}.step": step for name in _uses(checkpoint)} | {EXTRA: extra}
    state |= {f"optim.param_groups.{name}.{k}": v for name, v in _groups(checkpoint) for k, v in v.items()}
    planner = _Streaming(checkpoint, {theirs: own for theirs, (own, _) in sources.items()}, progress)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        save(state, storage_writer=FileSystemWriter(directory), planner=planner, no_dist=True)


def read(directory: Path) -> Foreign:
    """A DCP directory in our terms: what the table above names. Raises ValueError if it is none, or holds no model."""
    reader = _Reader(directory)
    found = {
        k: v for k, v in reader.read_metadata().state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)
    }
    extra = _read_extra(reader, found)
    names = {name: _ours(name) for name in found if name != EXTRA}
    tensors = {
        own: Lazy(tuple(found[n].size), _lazy(reader, n, found[n])) for n, own in names.items() if own is not None
    }
    params = {own.removeprefix("param/") for own in tensors if own.startswith("param/")}
    tensors = {own: lazy for own, lazy in tensors.items() if own.partition("/")[2] in params}
    if not params:
        raise ValueError(f"import: {directory} must hold tensors of a model, got none; is it a DCP directory of one?")
    steps = [name for name in found if name.endswith(".step") and _OPTIM.fullmatch(name)]
    extra.setdefault("step", int(_load(reader, steps[0], found[steps[0]]).item()) if steps else 0)
    for alias in _aliases(extra, params):
        tensors = {own: lazy for own, lazy in tensors.items() if own.partition("/")[2] != alias}
    return Foreign(tensors, {**extra, "imported": {"format": "dcp", "path": str(directory)}})


def import_(directory: Path, target: str, *, progress: Progress = silent) -> Checkpoint:
    """Make a durable checkpoint of a DCP directory. Raises ValueError as `read` does."""
    return store(read(directory), target, progress=progress)


class _Streaming(DefaultSavePlanner):
    """A save planner that reads a tensor when it is about to be written."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], progress: Progress) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._checkpoint, self._names, self._progress = checkpoint, names, progress

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor behind a planned write; whole, for every plan here has one chunk for a tensor."""
        name = self._names.get(write_item.index.fqn)
        if write_item.type == WriteItemType.BYTE_IO or name is None:
            return super().resolve_data(write_item)
        tensor = whole_tensor(self._checkpoint, name)
        self._progress(tensor.nbytes)
        return tensor


class _Reader(FileSystemReader):
    """DCP's reader, with metadata unpickled by a guest list, once."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        file = directory / ".metadata"
        if not file.is_file():
            raise ValueError(f"import: {directory} must be a DCP directory, got one without .metadata")
        self._metadata: Metadata = load_pickle(file, guests=_guests)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The metadata of the directory."""
        return self._metadata


def _guests(module: str, name: str) -> Any:
    if module == dcp_metadata.__name__ and name in _METADATA_NAMES:
        return getattr(dcp_metadata, name)
    return _StorageInfo if name == "_StorageInfo" else None


def _sources(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Their name -> our name and shape, of every tensor of the state."""
    found = {}
    for name, own in _uses(checkpoint).items():
        shape = checkpoint.index.by_name[f"param/{own}"].shape
        found[f"model.{name}"] = (f"param/{own}", shape)
    for name in parameters(checkpoint):
        for kind in MOMENTS:
            found[f"optim.state.{name}.{kind}"] = (f"{kind}/{name}", checkpoint.index.by_name[f"{kind}/{name}"].shape)
    return found


def _uses(checkpoint: Checkpoint) -> dict[str, str]:
    """The names that a model's state dict has, a tied head included -> the parameter's own name."""
    names = {name: name for name in parameters(checkpoint)}
    return names | ({"head.weight": "embed.weight"} if is_tied(checkpoint) else {})


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
    """AdamW's options of every parameter, as its own defaults and the run's config have them."""
    optim = checkpoint.extra.get("config", {}).get("optim", {})
    known = {key: optim[key] for key in ("lr", "eps", "weight_decay") if key in optim}
    betas = tuple(optim.get("betas", (0.9, 0.999)))
    for name, spec in parameters(checkpoint).items():
        options = torch.optim.AdamW([torch.empty(0, requires_grad=True)], betas=betas, **known).param_groups[0]
        decay = options["weight_decay"] if len(spec.shape) > 1 else 0.0
        yield name, {k: v for k, v in options.items() if k != "params"} | {"weight_decay": decay}


def _ours(name: str) -> str | None:
    """Our name of one of their tensors; None for the step."""
    optim = _OPTIM.fullmatch(name)
    if optim is not None:
        return None if optim[2] == "step" else f"{optim[2]}/{optim[1]}"
    if name.startswith(("optim", "lr_scheduler", "dataloader", "train_state")):
        return None
    match = _MODEL.fullmatch(name)
    return f"param/{match[1]}" if match is not None else None


def _aliases(extra: dict[str, Any], params: set[str]) -> set[str]:
    """Names under which a tied parameter was saved once more."""
    tied = extra.get("config", {}).get("model", {}).get("tie_embeddings", False)
    return {"head.weight"} & params if tied else set()


def _read_extra(reader: _Reader, found: dict[str, TensorStorageMetadata]) -> dict[str, Any]:
    if EXTRA not in found:
        return {}
    plain: dict[str, Any] = json.loads(bytes(_load(reader, EXTRA, found[EXTRA]).tolist()))
    return plain


def _lazy(reader: _Reader, name: str, entry: TensorStorageMetadata) -> Any:
    return lambda: _load(reader, name, entry)


def _load(reader: _Reader, name: str, entry: TensorStorageMetadata) -> Tensor:
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        load(state, storage_reader=reader, no_dist=True)
    return state[name]
