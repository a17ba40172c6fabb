"""Generation: text from a trained model, one token at a time.

    prompt -> tokens -> [model -> last logits -> draw one -> append] x num_tokens -> text

The context is cut to the length the model was trained on. Nothing is cached between tokens: this is for the few lines
that a run shows of itself, not for serving.

Rule of this file: one device, any module that maps tokens_BT to logits_BTV (B batch, T tokens, V vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from framework.data.windows import Data


def generate(
    model: torch.nn.Module,
    data: Data,
    *,
    prompt: str,
    num_tokens: int,
    seq_len: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """`num_tokens` tokens after the prompt, as text (the prompt is not repeated).

    The same seed gives the same text on the same machine. Temperature 0 takes the likeliest token each time. An
    empty prompt starts from the first held-out, or else training, sample's first token.
    """
    context = data.encode(prompt)
    if not len(context):
        context = (data.val(0) if data.num_val else data.train(0))[:1]
    drawn = continuation(
        model, context.tolist(), vocab_size=data.vocab_size, seq_len=seq_len, temperature=temperature, seed=seed
    )
    return data.decode(np.array([next(drawn) for _ in range(num_tokens)], dtype=np.int64))


def continuation(
    model: torch.nn.Module,
    context: list[int],
    *,
    vocab_size: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> Iterator[int]:
    """Tokens that follow the context, without end. Ids from `vocab_size` on, which are padding, are never drawn."""
    if temperature < 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}; 0 takes the likeliest token")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    choose = _chooser(temperature, seed)
    tokens = list(context)
    while True:
        with torch.inference_mode():
            window_BT = torch.tensor([tokens[-seq_len:]], device=device)
            logits_BTV = model(window_BT)
        tokens.append(choose(logits_BTV[0, -1, :vocab_size].float().cpu()))
        yield tokens[-1]


def _chooser(temperature: float, seed: int) -> Callable[[Tensor], int]:
    if temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    generator = torch.Generator().manual_seed(seed)
    return lambda logits_V: int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))
