"""A small decoder's state, and how to save and load it as ranks would; shared by the tests of durable checkpoints."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fault_tolerance.checkpoints.checkpoint import Checkpoint, ReadStats, commit
from fault_tolerance.checkpoints.shard import write_shard
from fault_tolerance.checkpoints.shelf import step_name
from parallel.atlas import STATE_KINDS, Atlas, TensorSpec
from parallel.boxes import Box
from parallel.layout import Layout

State = dict[str, NDArray[Any]]
NUM_LAYERS = 4


def decoder_specs(
    *,
    dim: int = 48,
    kv_dim: int = 24,
    ffn_dim: int = 100,
    vocab: int = 131,
    layers: int = NUM_LAYERS,
    tied: bool = False,
) -> tuple[TensorSpec, ...]:
    """The specs of a Llama-like model: uneven vocabulary and widths, grouped keys and values, tied embedding or not."""
    rows: list[tuple[str, tuple[int, ...], int | None, tuple[int, ...]]] = []
    rows.append(("embed.weight", (vocab, dim), 0, (0, layers + 1) if tied else (0,)))
    for i in range(layers):
        for name, shape, tp_dim in (
            ("attention_norm.weight", (dim,), None),
            ("attention.wq.weight", (dim, dim), 0),
            ("attention.wk.weight", (kv_dim, dim), 0),
            ("attention.wo.weight", (dim, dim), 1),
            ("ffn.up.weight", (ffn_dim, dim), 0),
            ("ffn.down.weight", (dim, ffn_dim), 1),
        ):
            rows.append((f"layers.{i}.{name}", shape, tp_dim, (i + 1,)))
    if not tied:
        rows.append(("head.weight", (vocab, dim), 0, (layers + 1,)))
    rows.append(("scale", (), None, (layers + 1,)))
    return tuple(TensorSpec(f"{kind}/{n}", s, "float32", t, u) for kind in STATE_KINDS for n, s, t, u in rows)


def random_state(specs: Sequence[TensorSpec], seed: int = 0) -> State:
    """Whole tensors of random numbers."""
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in specs}


def atlas_of(specs: Sequence[TensorSpec], layout: str, schedule: str = "1f1b", layers: int = NUM_LAYERS) -> Atlas:
    """The atlas of a layout such as `2x2x1`, or `1x4x1 flat` for another sharding than rows."""
    degrees, _, sharding = layout.partition(" ")
    return Atlas(tuple(specs), Layout.parse(degrees), schedule, layers, sharding or "rows")


def save(
    root: Path | str, atlas: Atlas, state: State, *, step: int = 1, extra: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Save as the ranks of the atlas would, each its own share."""
    directory = f"{root}/{step_name(step)}"
    entries = [
        write_shard(
            directory,
            f"rank{rank}",
            [(p, cut(state[p.tensor], p.box)) for p in atlas.owned(rank)],
            specs=atlas.specs,
        )
        for rank in range(atlas.layout.world)
    ]
    return commit(directory, entries, specs=atlas.specs, extra={"step": step, **(extra or {})})


def load(checkpoint: Checkpoint, atlas: Atlas, state: State) -> ReadStats:
    """Load on every rank of the atlas, and compare with the truth; returns the sum of what was read."""
    total = ReadStats(0, 0, 0)
    for rank in range(atlas.layout.world):
        out = {piece: torch.empty(piece.box.shape) for piece in atlas.held(rank)}
        stats = checkpoint.read_into(out)
        for piece, tensor in out.items():
            np.testing.assert_array_equal(tensor.numpy(), cut(state[piece.tensor], piece.box), err_msg=str(piece))
        total = ReadStats(*(a + b for a, b in zip(_fields(total), _fields(stats), strict=True)))
    return total


def cut(whole: NDArray[Any], box: Box) -> NDArray[Any]:
    """A box of a tensor, contiguous."""
    return np.ascontiguousarray(whole[box.within(Box.whole(whole.shape))]).reshape(box.shape)


def free_port() -> int:
    """A port of the loopback interface that nobody has at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _fields(stats: ReadStats) -> tuple[int, int, int]:
    return stats.bytes_needed, stats.bytes_read, stats.requests
