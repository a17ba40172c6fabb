"""Decoder: a Llama-style language model, written as if for one device.

    tokens -> embed -> layers "0" .. "L-1" -> norm -> head -> logits
                       |
                       x + attention(norm(x)), then x + ffn(norm(x))

It never mentions a mesh: `parallel/` cuts it from outside. Two habits make that possible. Head counts are
derived from the width of what a projection returns (a -1 in the view), so a slice of the heads works as all of
them do; and `embed`, `norm`, `head` or any of `layers` may be None or gone, which is how a pipeline stage looks.

Shapes: B batch, T time, D model width, H query heads, K key and value heads, E head width, F hidden width of the
feed-forward, V vocabulary.

A model of your own (`model._target_`) keeps the same contract, `parallel.contract.PipelineModel`.

Sources: Llama 2 (arXiv 2307.09288, section 2.2), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cosines, sines) of the rotation at each position, fp32, shape (T, 1, E/2).

    Made anew for every call, which costs a hundredth of a small layer and nothing of a large one: a table kept from
    the first call makes the recomputation of activation checkpointing, and compiled graphs, differ from the first.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), theta**-exponent)
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: each pair (i, i + E/2) of a head, turned by its position's angle, in fp32."""
    first, second = x_BTHE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHE.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, rope_theta: float) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = dim // num_heads, rope_theta
        self.wq = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q_BTHE, k_BTKE, v_BTKE = (self._heads(project(x_BTD)) for project in (self.wq, self.wk, self.wv))
        cos, sin = rope_table(q_BTHE.shape[1], self.head_dim, self.rope_theta, q_BTHE.device)
        q_BTHE, k_BTKE = rotate(q_BTHE, cos, sin), rotate(k_BTKE, cos, sin)
        out_BHTE = scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
        )
        return self.wo(out_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, *, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down(silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normed stream and added back to it."""

    def __init__(
        self, *, dim: int, num_heads: int, num_kv_heads: int, ffn_dim: int, rope_theta: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, rope_theta=rope_theta)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn = FeedForward(dim=dim, ffn_dim=ffn_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Decoder(nn.Module):
    """The whole model, or a stage of it. Raises ValueError where head counts do not fit the width."""

    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads, num_kv_heads)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.embed: nn.Module | None = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleDict(
            {
                str(i): Block(
                    dim=dim,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    ffn_dim=ffn_dim,
                    rope_theta=rope_theta,
                    norm_eps=norm_eps,
                )
                for i in range(num_layers)
            }
        )
        self.norm: nn.Module | None = nn.RMSNorm(dim, eps=norm_eps)
        self.head: nn.Module | None = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T), or the stream (B, T, D) where `embed` is gone, to logits (B, T, V), or the stream."""
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x)

    def tp_plan(self) -> Mapping[str, str]:
        """How tensor parallelism cuts it: a pattern of module names to a style of `parallel.tensor.STYLES`."""
        return {
            "embed": "embedding",
            "layers.*.attention_norm": "norm",
            "layers.*.attention": "gather",
            "layers.*.attention.wq": "column",
            "layers.*.attention.wk": "column_kv",
            "layers.*.attention.wv": "column_kv",
            "layers.*.attention.wo": "row",
            "layers.*.ffn_norm": "norm",
            "layers.*.ffn": "gather",
            "layers.*.ffn.gate": "column",
            "layers.*.ffn.up": "column",
            "layers.*.ffn.down": "row",
            "norm": "norm",
            "head": "head",
        }

    def initial(self, name: str) -> tuple[float, float]:
        """(mean, standard deviation) of a parameter's first values: GPT-2's 0.02, residual outputs by 1/sqrt(2 L)."""
        if "norm" in name:
            return 1.0, 0.0
        residual = name.endswith(("attention.wo.weight", "ffn.down.weight"))
        return 0.0, 0.02 / (2 * len(self.layers)) ** 0.5 if residual else 0.02


def _check_heads(dim: int, num_heads: int, num_kv_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"model.dim {dim} does not divide by model.num_heads {num_heads}; change one of them")
    if (dim // num_heads) % 2:
        raise ValueError(f"model.dim / model.num_heads: must be even for RoPE, got {dim // num_heads}; change one")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"model.num_heads {num_heads} does not divide by model.num_kv_heads {num_kv_heads}; change one of them"
        )


def num_params(model: nn.Module) -> int:
    """Number of elements of all parameters, a tied one counted once. Works on the meta device."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module, *, seq_len: int) -> float:
    """Floating-point operations of a forward and backward pass per token, for model FLOPs utilisation.

    6 per element of every matrix that multiplies (an embedding that is only looked up is not one), and 12 * width *
    T per layer for attention scores, halved because they are causal. Source: PaLM (2204.02311), appendix B.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)
    layers: nn.ModuleDict = model.get_submodule("layers")  # type: ignore[assignment]
    return 6.0 * matrices + 6.0 * len(layers) * float(model.dim) * seq_len  # type: ignore[arg-type]
