"""Finish: what is said of a run's final state: its digest, and a few lines of text that the model writes.

Both read whole logical tensors, one at a time, from wherever the state is kept, so that neither depends on the layout
the run ended on.

Rule of this file: it reads state; it changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fault_tolerance.digest import StateHasher
from framework.build import model_builder
from framework.config import Config
from framework.data.windows import Data
from framework.training.generate import generate
from parallel.assemble import materialise, meta
from parallel.atlas import TensorSpec
from parallel.contract import HasBuffers
from parallel.specs import ties

ReadTensor = Callable[[str], NDArray[Any]]
PROMPT = "def "


def state_digest(specs: Sequence[TensorSpec], read: ReadTensor, *, step: int) -> str:
    """SHA-256 of the logical state (see `StateHasher`)."""
    hasher = StateHasher()
    for spec in sorted(specs, key=lambda spec: spec.name):
        hasher.begin(spec.name, spec.shape)
        hasher.update(read(spec.name))
    return hasher.finish(step)


@torch.no_grad()
def sample_text(config: Config, data: Data, read: ReadTensor) -> str:
    """Text that the trained model writes, on one device, with the same seed the same text."""
    build = model_builder(config)
    aliases = {tie.alias: tie.name for tie in ties(meta(build))}
    model = meta(build)
    materialise(model, torch.device("cpu"))
    if isinstance(model, HasBuffers):
        model.reset_buffers()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        values = np.ascontiguousarray(read(f"param/{aliases.get(name, name)}"))
        parameter.copy_(torch.from_numpy(values))
    return PROMPT + generate(
        model, data, prompt=PROMPT, num_tokens=config.monitor.sample_bytes, seq_len=config.data.seq_len, seed=config.seed
    )
