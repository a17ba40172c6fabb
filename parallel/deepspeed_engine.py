"""DeepSpeed engine: the seam `Engine`, hosted on DeepSpeed's ZeRO stages 1, 2 and 3, with pp 1 and tp 1.

    forward_backward     DeepSpeed's backward: gradients reduced over dp, kept where their optimizer state is
    grad_square_sum      the end of an accumulation; what is kept here, squared
    update               DeepSpeed's optimizer step, with our AdamW inside: rate, step number and scale from the seam
    state                views of ZeRO's flat fp32 partitions, box by box (`Atlas`, sharding "groups" or "flat")

What is ours: groups (the mesh's), first weights, clipping, checkpoints, and parameters that are not trained, of which
each rank keeps a flat part. DeepSpeed averages gradients over replicas; the loss is multiplied by their number, so that
they are sums, as everywhere here.

Sources: ZeRO (arXiv 1910.02054), ZeRO-Offload (2101.06840).

Rule of this file: what it takes from DeepSpeed's private parts (0.19.8) it takes by name and checks in numbers, and a
closed engine leaves nothing of itself in DeepSpeed's globals (`deepspeed_library.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import deepspeed_library as library
from parallel.assemble import assemble_whole, meta
from parallel.atlas import STATE_KINDS, Atlas, Piece
from parallel.contract import check_model
from parallel.data import PRECISIONS
from parallel.deepspeed_optimizer import HostedAdamW
from parallel.engine import EngineOptions, Weights, fill, microbatches
from parallel.flat import Flat, decays
from parallel.loss import summed_cross_entropy
from parallel.mesh import Mesh
from parallel.specs import state_specs


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """What ZeRO cuts: optimizer state (1), gradients too (2), parameters too (3); and where the optimizer works."""

    stage: int = 1
    offload_optimizer: bool = False

    @property
    def sharding(self) -> str:
        """How the state lies over the ranks of dp, in the terms of `Atlas`."""
        return "flat" if self.stage == 3 else "groups"


class DeepSpeedEngine:
    """One per mesh, and one at a time in a process; parameters are zero until `initialise` or a load."""

    def __init__(self, build: Callable[[], nn.Module], *, mesh: Mesh, options: EngineOptions, zero: Zero) -> None:
        """`build` makes the whole model; it is called on the meta device.

        Raises ValueError if the model breaks its contract, layout and options do not go together, or DeepSpeed is not
        installed; RuntimeError if it cuts the state otherwise than the atlas says.
        """
        whole = meta(build)
        check_model(whole)
        self._mesh, self._options, self._zero = mesh, options, zero
        num_layers = len(whole.layers)  # type: ignore[arg-type]
        self.atlas = Atlas(state_specs(whole), mesh.layout, options.schedule, num_layers, zero.sharding)
        self._model = assemble_whole(build, device=mesh.device, wrapping=options.wrapping)
        trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = HostedAdamW(
            trained.values(), betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
        )
        self._groups = [{n: p for n, p in trained.items() if decays(tuple(p.shape)) is d} for d in (True, False)]
        self._groups = [group for group in self._groups if group]
        dtypes = {name: buffer.dtype for name, buffer in self._model.named_buffers()}
        self._engine = library.initialize(
            self._model,
            self._optimizer,
            config=_config(zero, options.wrapping.precision, sum(p.numel() for p in trained.values())),
            mesh=mesh,
        )
        for name, buffer in self._model.named_buffers():
            assert buffer.dtype == dtypes[name], f"DeepSpeed changed the type of buffer {name}"
        self._frozen = {n: _Frozen(n, p, self.atlas, mesh) for n, p in self._model.named_parameters() if not p.requires_grad}
        self._partition = library.Partition(self._engine.optimizer, stage=zero.stage, offload=zero.offload_optimizer)
        self._pieces = dict(self._views())
        self._collected = False

    def forward_backward(self, tokens_BT: Tensor, labels_BT: Tensor, *, num_tokens: int) -> Tensor:
        """See `Engine`."""
        assert not self._collected, "forward_backward after grad_square_sum needs update or discard in between"
        sums = []
        for tokens, labels in zip(self._microbatches(tokens_BT), self._microbatches(labels_BT), strict=True):
            loss = summed_cross_entropy(self._engine(tokens), labels)
            self._engine.backward(loss * (self._mesh.layout.dp / num_tokens), scale_wrt_gas=False)
            sums.append(loss.detach())
        return torch.stack(sums).double().sum()

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """See `Engine`."""
        microbatches = zip(self._microbatches(tokens_BT), self._microbatches(labels_BT), strict=True)
        return torch.stack([summed_cross_entropy(self._engine(t), y) for t, y in microbatches]).double().sum()

    def grad_square_sum(self) -> Tensor:
        """See `Engine`."""
        self._collect()
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in self._partition.gradients()]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self._mesh.device)

    def update(self, *, step: int, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        self._collect()
        self._optimizer.next(step=step, lr=lr, grad_scale=grad_scale)
        self._engine.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """See `Engine`."""
        self._partition.discard()
        self._collected = False

    def state(self) -> dict[Piece, Tensor]:
        """See `Engine`."""
        return dict(self._pieces)

    def initialise(self, weights: Weights) -> None:
        """See `Engine`."""
        fill(self, weights)

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """See `Engine`. Collective: the working copies of the parameters are gathered again."""
        self.discard()
        for frozen in self._frozen.values():
            frozen.refresh(partitioned=self._zero.stage == 3)
        self._partition.refresh()

    def close(self) -> None:
        """See `Engine`. Nothing is asked of peers: they may be gone."""
        self._pieces.clear()
        engine = self._engine
        del self._engine, self._model, self._optimizer, self._groups, self._frozen, self._partition
        library.release(engine)

    def _collect(self) -> None:
        if not self._collected:
            library.end_accumulation(self._engine, stage=self._zero.stage)
            self._collected = True

    def _views(self) -> Iterator[tuple[Piece, Tensor]]:
        """The rank's pieces, end to end in each parameter's flat part."""
        shards = {name: frozen.memory for name, frozen in self._frozen.items()}
        shards |= self._partition.shards(self._groups, self._flats(), self._mesh.seat[1])
        at: dict[str, int] = {}
        for piece in self.atlas.held(self._mesh.rank):
            kind, _, name = piece.tensor.partition("/")
            start = at.get(piece.tensor, 0)
            at[piece.tensor] = start + piece.box.size
            yield piece, shards[name][kind][start : at[piece.tensor]].view(piece.box.shape)

    def _flats(self) -> dict[str, Flat]:
        return {name.partition("/")[2]: flat for name, flat in self.atlas.flats.items() if name.startswith("param/")}

    def _microbatches(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        return microbatches(x_BT, self._options.num_microbatches, self._mesh.device)


class _Frozen:
    """A parameter that is not trained: each rank keeps a flat fp32 part of it, and of moments that stay zero."""

    def __init__(self, name: str, parameter: nn.Parameter, atlas: Atlas, mesh: Mesh) -> None:
        flat = atlas.flats[f"param/{name}"]
        start, stop = flat.range_of(mesh.seat[1])
        self._parameter, self._flat, self._mesh = parameter, flat, mesh
        self._parts = {kind: torch.zeros(flat.part, device=mesh.device) for kind in STATE_KINDS}
        self.memory = {kind: part[: stop - start] for kind, part in self._parts.items()}

    def refresh(self, *, partitioned: bool) -> None:
        """Make the parameter that computes what the parts say."""
        part = self._parts["param"]
        if partitioned:
            library.write_partition(self._parameter, part)
            return
        whole = torch.empty(self._flat.part * self._mesh.layout.dp, device=self._mesh.device)
        dist.all_gather_into_tensor(whole, part, group=self._mesh.group("dp"))
        self._parameter.data.copy_(whole[: self._flat.numel].view(self._parameter.shape))


def _config(zero: Zero, precision: str, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's own config. Batch sizes say nothing here: the caller ends an accumulation when it wants to."""
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": False,
        "reduce_bucket_size": max(2, min(50_000_000, num_trained)),
    }
    if zero.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    elif zero.stage < 3:
        stage["compute_grad_norm"] = False  # the seam's caller does
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # unset, it would be 1.0
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": stage,
    }
    if PRECISIONS[precision] is torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config
