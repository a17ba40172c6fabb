"""Engine: what a trainer asks of one rank's share of the model, and the engine built on FSDP2, DTensor and pipelining.

    forward_backward -> grad_square_sum -> (all ranks agree on a scale) -> update
                                            state() is live memory, shaped like atlas.held(rank)

Rule of this file: `Engine` is the seam. Who uses it sees this rank's boxes of the state and two sums that are meaningful
when added over all ranks; nobody outside needs to know how a layout is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.adamw import AdamW, Slot
from parallel.assemble import assemble_stage, meta
from parallel.atlas import Atlas, TensorSpec
from parallel.boxes import Box
from parallel.checks import ModelNumbers, Wrapping, check
from parallel.contract import check_model
from parallel.data import PRECISIONS
from parallel.mesh import Mesh
from parallel.pipeline import Accumulation, Pipeline, Runner
from parallel.specs import Tie, state_specs, ties
from parallel.stages import num_stages, stages_of_rank, units_of_stage

Weights = Callable[[str, tuple[int, ...], Box], Tensor]


class Engine(Protocol):
    """One rank's share of a model in training."""

    atlas: Atlas

    def forward_backward(self, tokens_BT: Tensor, labels_BT: Tensor, *, num_tokens: int) -> Tensor:
        """Add the gradients of (summed cross-entropy / num_tokens) of this data-parallel replica's samples.

        All ranks of a replica pass the same samples; labels of -100 count for nothing. Gradients are summed over
        replicas, not averaged. Returns a float64 scalar which, added over all ranks, is the global summed
        cross-entropy in nats. Raises ValueError if B does not divide by the number of microbatches.
        """

    def grad_square_sum(self) -> Tensor:
        """float64 scalar which, added over all ranks, is the squared norm of the whole gradient."""

    def update(self, *, step: int, lr: float, grad_scale: float) -> None:
        """Multiply the gradients by `grad_scale`, take AdamW step number `step` (1-based), and drop them."""

    def discard(self) -> None:
        """Drop the gradients."""

    def evaluate(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """What `forward_backward` returns, without gradients."""

    def state(self) -> dict[str, Tensor]:
        """Live, contiguous fp32 memory of each piece of `atlas.held(rank)`, by spec name, of its box's shape."""

    def initialise(self, weights: Weights) -> None:
        """Parameters from `weights(name, shape, box)`, moments zero, no step taken."""

    def loaded(self, step: int) -> None:
        """Say that `state()` was written to and is now that of `step` steps."""

    def close(self) -> None:
        """Free what the engine holds, before its mesh is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to train. `checks.check` says which values go together."""

    schedule: str = "1f1b"
    num_microbatches: int = 1
    wrapping: Wrapping = field(default_factory=Wrapping)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A logical parameter as this rank holds it: `copies` are the same parameter in later stages of this rank."""

    spec: TensorSpec
    name: str
    parameter: nn.Parameter
    copies: tuple[nn.Parameter, ...]
    counts: bool
    partner: int | None


class FsdpEngine:
    """The engine of the default configuration. One per mesh; parameters are zero until `initialise` or a load."""

    def __init__(self, build: Callable[[], nn.Module], *, mesh: Mesh, options: EngineOptions) -> None:
        """`build` makes the whole model; it is called on the meta device.

        Raises ValueError if the model breaks its contract, or does not go together with layout and options.
        """
        whole = meta(build)
        layout = mesh.layout
        check_model(whole, tp=layout.tp)
        check(
            _numbers(whole),
            layout=layout,
            schedule=options.schedule,
            num_microbatches=options.num_microbatches,
            wrapping=options.wrapping,
        )
        self._mesh, self._options = mesh, options
        self.atlas = Atlas(state_specs(whole), layout, options.schedule, len(whole.layers))  # type: ignore[arg-type]
        self._aliases = {tie.alias: tie.name for tie in ties(whole)}
        self._stages = self._assemble(build, ties(whole))
        self._runner = self._make_runner(int(whole.dim))  # type: ignore[arg-type]
        self._leaves = list(self._find_leaves())
        self._slots = {leaf.name: _slot(leaf) for leaf in self._leaves}
        trained = [self._slots[leaf.name] for leaf in self._leaves if leaf.parameter.requires_grad]
        self._adamw = AdamW(trained, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
        self._gradients: dict[str, Tensor] | None = None

    def forward_backward(self, tokens_BT: Tensor, labels_BT: Tensor, *, num_tokens: int) -> Tensor:
        """See `Engine`."""
        assert self._gradients is None, "forward_backward after grad_square_sum needs update or discard in between"
        tokens, labels = self._microbatches(tokens_BT), self._microbatches(labels_BT)
        return self._total(self._runner.train(tokens, labels, num_tokens=num_tokens))

    def evaluate(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """See `Engine`."""
        return self._total(self._runner.evaluate(self._microbatches(tokens_BT), self._microbatches(labels_BT)))

    def grad_square_sum(self) -> Tensor:
        """See `Engine`."""
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            for leaf, gradient in self._local_gradients()
            if leaf.counts
        ]
        return torch.stack(squares).sum() if squares else self._zero()

    def update(self, *, step: int, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        gradients = {id(self._slots[leaf.name].param): gradient for leaf, gradient in self._local_gradients()}
        if grad_scale != 1.0 and gradients:
            torch._foreach_mul_(list(gradients.values()), grad_scale)
        self._adamw.update(gradients, step=step, lr=lr)
        self.discard()
        self._refresh_copies()

    def discard(self) -> None:
        """See `Engine`."""
        self._gradients = None
        for module in self._stages.values():
            for parameter in module.parameters():
                parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {
            piece.tensor: getattr(self._slots[name], kind)
            for piece in self.atlas.held(self._mesh.rank)
            for kind, _, name in [piece.tensor.partition("/")]
        }

    @torch.no_grad()
    def initialise(self, weights: Weights) -> None:
        """See `Engine`."""
        state = self.state()
        for piece in self.atlas.held(self._mesh.rank):
            kind, _, name = piece.tensor.partition("/")
            if kind == "param":
                state[piece.tensor].copy_(weights(name, self.atlas.by_name[piece.tensor].shape, piece.box))
            else:
                state[piece.tensor].zero_()
        self.loaded(0)

    def loaded(self, step: int) -> None:
        """See `Engine`."""
        self.discard()
        self._refresh_copies()

    def close(self) -> None:
        """See `Engine`."""
        self.discard()
        self._stages.clear()
        self._leaves.clear()
        self._slots.clear()
        del self._runner, self._adamw

    def _assemble(self, build: Callable[[], nn.Module], tied: tuple[Tie, ...]) -> dict[int, nn.Module]:
        layout, schedule = self._mesh.layout, self._options.schedule
        count = num_stages(schedule, layout.pp)
        return {
            stage: assemble_stage(
                build,
                units=units_of_stage(self.atlas.num_layers, count, stage),
                ties=tied,
                mesh=self._mesh,
                wrapping=self._options.wrapping,
            )
            for stage in stages_of_rank(schedule, layout.pp)[self._mesh.seat[0]]
        }

    def _make_runner(self, dim: int) -> Runner:
        layout, wrapping = self._mesh.layout, self._options.wrapping
        if layout.pp == 1:
            return Accumulation(self._stages[0], reshard_between=wrapping.reshard_after_forward)
        cut = layout.tp if wrapping.sequence_parallel else 1
        return Pipeline(
            self._stages,
            schedule=self._options.schedule,
            group=self._mesh.group("pp"),
            device=self._mesh.device,
            stream=lambda batch, length: (batch, length // cut, dim),
            dtype=PRECISIONS[wrapping.precision],
        )

    def _find_leaves(self) -> Iterator[_Leaf]:
        found: dict[str, list[nn.Parameter]] = {}
        for module in self._stages.values():
            for local_name, parameter in module.named_parameters():
                found.setdefault(self._aliases.get(local_name, local_name), []).append(parameter)
        for name, parameters in found.items():
            spec = self.atlas.by_name[f"param/{name}"]
            holders = self.atlas.holders(spec, self._mesh.rank)
            yield _Leaf(
                spec,
                name,
                parameters[0],
                tuple(parameters[1:]),
                counts=holders[0] == self._mesh.rank,
                partner=self._partner(spec),
            )

    def _partner(self, spec: TensorSpec) -> int | None:
        """The rank of another stage that uses the same box of a tied parameter."""
        pp, dp, tp = self._mesh.seat
        stages = [p for p in range(self._mesh.layout.pp) if not self.atlas.units(p).isdisjoint(spec.units)]
        others = [p for p in stages if p != pp]
        return self._mesh.layout.rank(others[0], dp, tp) if others else None

    def _microbatches(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        count = self._options.num_microbatches
        if x_BT.shape[0] % count:
            raise ValueError(
                f"forward_backward: samples of a replica must divide by layout.num_microbatches {count}, "
                f"got {x_BT.shape[0]}; pad with samples whose labels are -100"
            )
        return x_BT.to(self._mesh.device).chunk(count)

    def _total(self, sums: list[Tensor]) -> Tensor:
        """The replica's sum on its first tensor-parallel rank; zero elsewhere, and where the loss is not."""
        if not sums or self._mesh.seat[2]:
            return self._zero()
        return torch.stack(sums).double().sum()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._mesh.device)

    def _local_gradients(self) -> list[tuple[_Leaf, Tensor]]:
        """Every leaf's gradient, whole over microbatches, replicas, tp and ties, cut like the leaf."""
        if self._gradients is None:
            self._gradients = {}
            for leaf in self._leaves:
                gradient = _sum_gradients(leaf)
                if leaf.partner is not None:
                    gradient = self._exchange(leaf, gradient)
                if gradient is not None and gradient.numel():
                    self._gradients[leaf.name] = gradient
        return [(leaf, self._gradients[leaf.name]) for leaf in self._leaves if leaf.name in self._gradients]

    def _exchange(self, leaf: _Leaf, gradient: Tensor | None) -> Tensor:
        """Add the other stage's gradient of a tied parameter, earlier stage first, so that both get equal bits."""
        assert leaf.partner is not None
        local = self._slots[leaf.name].param
        mine = torch.zeros_like(local) if gradient is None else gradient.contiguous()
        theirs = torch.empty_like(local)
        if local.numel():
            group = self._mesh.group("pp")
            operations = [
                dist.P2POp(dist.isend, mine, leaf.partner, group),
                dist.P2POp(dist.irecv, theirs, leaf.partner, group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return mine + theirs if self._mesh.rank < leaf.partner else theirs + mine

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        for leaf in self._leaves:
            for copy in leaf.copies:
                _local(copy).copy_(_local(leaf.parameter))


def _numbers(whole: nn.Module) -> ModelNumbers:
    table = getattr(whole.embed, "weight", None)
    return ModelNumbers(
        num_layers=len(whole.layers),  # type: ignore[arg-type]
        vocab_size=None if table is None else table.shape[0],
        num_heads=getattr(whole, "num_heads", None),
        num_kv_heads=getattr(whole, "num_kv_heads", None),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def _slot(leaf: _Leaf) -> Slot:
    param = _local(leaf.parameter)
    decays = len(leaf.spec.shape) >= 2
    return Slot(param, torch.zeros_like(param), torch.zeros_like(param), decays)


def _sum_gradients(leaf: _Leaf) -> Tensor | None:
    total: Tensor | None = None
    for parameter in (leaf.parameter, *leaf.copies):
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            assert isinstance(parameter, DTensor)
            gradient = gradient.redistribute(placements=parameter.placements).to_local()
        total = gradient if total is None else total + gradient
    return total
