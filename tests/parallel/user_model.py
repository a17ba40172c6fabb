"""A user's own model, with what ours has not: biases, a buffer, no plan, no first weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """A layer that looks back by fixed decaying weights, kept in a buffer."""

    decay: Tensor

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        self.register_buffer("decay", torch.empty(length, length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(self.decay @ self.norm(x))))


class Recurrence(nn.Module):
    """Written against `parallel.contract`, without a word about distribution."""

    def __init__(self, *, vocab_size: int, num_layers: int, dim: int, length: int) -> None:
        super().__init__()
        self.dim = dim
        self.embed: nn.Module | None = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleDict({str(i): Mixer(dim, length) for i in range(num_layers)})
        self.norm: nn.Module | None = nn.LayerNorm(dim)
        self.head: nn.Module | None = nn.Linear(dim, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x)

    def reset_buffers(self) -> None:
        for layer in self.layers.values():
            assert isinstance(layer, Mixer)
            steps = torch.arange(layer.decay.shape[0])
            layer.decay.copy_(torch.tril(0.5 ** (steps[:, None] - steps[None, :]).clamp(min=0).float()))


class Planned(Recurrence):
    """The same with a plan for tensor parallelism without sequence parallelism: what it leaves out runs on every rank."""

    def tp_plan(self) -> dict[str, str]:
        return {
            "embed": "embedding",
            "layers.*.inner": "column",
            "layers.*.outer": "row",
            "head": "head",
        }


class PartlyFrozen(Recurrence):
    """The same, of which some is not trained: an embedding, a matrix in the middle, and a bias."""

    def __init__(self, *, vocab_size: int, num_layers: int, dim: int, length: int) -> None:
        super().__init__(vocab_size=vocab_size, num_layers=num_layers, dim=dim, length=length)
        assert self.embed is not None
        self.embed.requires_grad_(False)
        self.layers["1"].inner.requires_grad_(False)
