"""DeepSpeed library: the one place that imports deepspeed, and all that is taken from its private parts.

    initialize          on groups that are ours, without compiling anything, without a launcher's environment
    Partition           where a rank's flat fp32 parameters, moments and gradients lie, for each stage
    release             DeepSpeed keeps engines, groups and counters in globals: given back, so that the next generation
                        of this process starts as a new one would

Rule of this file: written against DeepSpeed 0.19.8, whose version is checked; it knows no model and no training loop.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed_optimizer import HostedAdamW
from parallel.flat import Flat
from parallel.mesh import Mesh

VERSION = "0.19.8"


def check_installed() -> None:
    """Raises ValueError, one line, if DeepSpeed is not here or is another version than this was written against."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise ValueError(
            f"layout.engine: deepspeed needs DeepSpeed {VERSION}, got {found}; "
            f"pip install deepspeed=={VERSION}, or use layout.engine=fsdp"
        )


def initialize(model: nn.Module, optimizer: HostedAdamW, *, config: Mapping[str, Any], mesh: Mesh) -> Any:
    """A DeepSpeed engine on the mesh's groups."""
    check_installed()
    _environment(mesh)
    import deepspeed

    forget()  # of an engine whose start failed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at start, and leak
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with contextlib.redirect_stdout(None):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config), mpu=_Groups(mesh), dist_init_required=False
        )
    return engine


def end_accumulation(engine: Any, *, stage: int) -> None:
    """What `engine.step` does before it steps: gradients of all backwards since the last step, reduced, are in place."""
    if stage >= 2:
        engine.optimizer.finalize_gradient_accumulation_boundary()
        return
    engine._running_engine_step = True
    try:
        engine.allreduce_gradients()
    finally:
        engine._running_engine_step = False


@torch.no_grad()
def write_partition(parameter: nn.Parameter, part: Tensor) -> None:
    """Put this rank's flat part into a parameter that ZeRO-3 has cut."""
    target: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    target.data[: part.numel()].copy_(part)


class Partition:
    """A ZeRO optimizer's flat memory. `groups` everywhere: the names and parameters of each param group, in order."""

    def __init__(self, optimizer: Any, *, stage: int, offload: bool) -> None:
        self._zero, self._stage, self._offload = optimizer, stage, offload
        self._inner: HostedAdamW = optimizer.optimizer

    def shards(
        self, groups: Sequence[Mapping[str, nn.Parameter]], flats: Mapping[str, Flat], rank: int
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """For each trained parameter, this rank's part of it and its moments, flat. Call once: it makes the moments.

        Raises RuntimeError if DeepSpeed's parts are not those that `flats` says.
        """
        names = {id(p): name for group in groups for name, p in group.items()}
        for flat, members, part in self._memory():
            memory = self._inner.adopt(flat)
            at = 0
            for parameter in members:
                name = names.pop(id(parameter))
                where = flats[name]
                start, stop = where.range_of(rank)
                own = part(parameter)
                if own != where.part:
                    raise RuntimeError(f"deepspeed: a part of {name} must have {where.part} elements, got {own}")
                begin = at if self._stage == 3 else max(0, where.offset - rank * where.part)
                yield name, {kind: whole[begin : begin + stop - start] for kind, whole in memory.items()}
                at += own
        if names:
            raise RuntimeError(f"deepspeed: must hold every trained parameter, got none of {sorted(names.values())}")

    def gradients(self) -> list[Tensor]:
        """This rank's reduced gradients, flat, padding of zeros included; after `end_accumulation`."""
        if self._offload:
            return [flat.grad for flat, *_ in self._memory() if flat.grad is not None]
        return [g for group in self._zero.averaged_gradients.values() if group is not None for g in group]

    def discard(self) -> None:
        """Drop gradients, wherever DeepSpeed keeps them."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients = {}
        zero._epilogue_ran_this_backward = False
        if self._offload:
            zero.reset_cpu_buffers()
            for flat, *_ in self._memory():
                assert flat.grad is not None, "an optimizer that is offloaded keeps its gradients' memory"
                flat.grad.zero_()
        if self._stage == 3:
            zero.micro_step_id = 0
            zero._offload_boundary_param_ids = set()
            for bucket in zero.ipg_buckets.values():
                bucket.clear_params()
            return
        zero.micro_step_id = -1
        zero.all_grad_tensors = {}
        zero._release_preflattened_grad_buffers()
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        if self._offload:
            zero.accumulated_grads_in_cpu.clear()
            zero._offload_accumulated_param_ids = set()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the parameters that compute what the flat fp32 memory says. Collective."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _memory(self) -> Iterator[tuple[Tensor, Sequence[nn.Parameter], Any]]:
        """(flat fp32 partition, the parameters it is made of, elements of a parameter's part)."""
        zero = self._zero
        if self._stage == 3:
            for flat, members in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                yield flat, members, lambda p: p.partition_numel()
            return
        rows = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.partition_size, strict=True)
        for flat, members, size in rows:
            yield flat, members, lambda p, size=size: size


def release(engine: Any) -> None:
    """End an engine, and make DeepSpeed forget it and every group."""
    engine.destroy()
    engine.optimizer = None
    engine.module = None
    forget()
    gc.collect()


def forget() -> None:
    """Put DeepSpeed's globals back to what they are in a new process."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    parameter_offload.FWD_MODULE_STACK.clear()
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    for method in vars(PartitionedParameterCoordinator).values():  # one is cached, and keeps the modules it was called with
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    groups._release_process_group_references(group=None)
    comm.cdb = None


class _Groups:
    """The mesh, as DeepSpeed asks a Megatron for its groups."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("dp")

    def get_data_parallel_rank(self) -> int:
        return self._mesh.seat[1]

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.layout.dp

    def get_data_parallel_group_ranks(self) -> range:
        return range(self._mesh.layout.dp)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("tp")

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _environment(mesh: Mesh) -> None:
    """What DeepSpeed reads from a launcher's environment."""
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    os.environ["LOCAL_SIZE"] = "0"
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
