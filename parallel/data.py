"""Data parallelism: FSDP2 on every bucket of layers and on the rest, gradients summed.

    each bucket (stages.py), and the root (embed, norm, head), is one unit: gathered before it computes, and let go
    after its backward, or also after its forward with `reshard_after_forward`

With precision bf16, units are gathered and computed in bf16, gradients are reduced in fp32, and the shards, which the
optimizer updates, stay fp32. Gradients are *summed* over replicas: the loss is already divided by the global count.

Sources: PyTorch FSDP (arXiv 2304.11277), ZeRO (1910.02054, section 5).

Rule of this file: it wraps modules. With one replica and fp32 there is nothing to wrap, and nothing is.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def needs_fsdp(*, dp: int, precision: str) -> bool:
    """Whether `shard` has anything to do."""
    return dp > 1 or precision != "fp32"


def shard_unit(modules: list[nn.Module], mesh: DeviceMesh, *, precision: str, reshard_after_forward: bool) -> None:
    """Make modules that compute one after the other one FSDP unit over the data-parallel mesh. In place.

    Their parameters are on the device.
    """
    policy = MixedPrecisionPolicy()
    if precision != "fp32":
        policy = MixedPrecisionPolicy(param_dtype=PRECISIONS[precision], reduce_dtype=torch.float32)
    fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    unit = modules[0]  # the others share what it keeps
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def units(module: nn.Module) -> list[FSDPModule]:
    """The FSDP units of a module, itself included."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def sync_on_this_backward(module: nn.Module, last: bool, *, reshard: bool) -> None:
    """Say before each microbatch's backward whether it is the last: only then are gradients reduced.

    Gathered parameters are let go after the last backward, and after the others too if `reshard`.
    """
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last or reshard)


def let_go(module: nn.Module) -> None:
    """Free gathered parameters, after a forward that no backward follows, or one that was given up."""
    for unit in units(module):
        unit.reshard()
