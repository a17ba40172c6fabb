"""Loss: the summed cross-entropy of next tokens, whole or cut along the vocabulary.

Summed, not averaged, and divided by the number of tokens of the *global* batch: then gradients add up over
microbatches, data-parallel replicas and padding (labels of -100 count for nothing) with no further weights.

Rule of this file: logits and labels in, a scalar out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.functional import cross_entropy

IGNORED = -100


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over all labels but -100, in nats, fp32, on every tensor-parallel rank. Call inside `vocabulary_parallel`."""
    loss = cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss


@contextmanager
def vocabulary_parallel() -> Iterator[None]:
    """Where forward *and backward* of a loss over DTensor logits must run. Restores torch also when they raise."""
    context = loss_parallel()
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)
