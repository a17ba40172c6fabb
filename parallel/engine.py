"""Engine: what a trainer asks of one rank's share of the model, and the engine built on FSDP2, DTensor and pipelining.

    forward_backward -> grad_square_sum -> (all ranks agree on a scale) -> update
                                            state() is live memory, shaped like atlas.held(rank)

Rule of this file: `Engine` is the seam. Who uses it sees this rank's boxes of the state and two sums that are meaningful
when added over all ranks; nobody outside needs to know how a layout is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.adamw import AdamW
from parallel.assemble import assemble_stage, meta
from parallel.atlas import Atlas, Piece
from parallel.boxes import Box
from parallel.checks import ModelNumbers, Wrapping, check
from parallel.contract import check_model
from parallel.data import PRECISIONS
from parallel.leaves import Leaves
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

    def state(self) -> dict[Piece, Tensor]:
        """Live, contiguous fp32 memory of each piece of `atlas.held(rank)`, of its box's shape."""

    def initialise(self, weights: Weights) -> None:
        """Parameters from `weights(name, shape, box)`, moments zero, no step taken."""

    def loaded(self, step: int) -> None:
        """Say that `state()` was written to and is now that of `step` steps."""

    def close(self) -> None:
        """Free what the engine holds, before its mesh is closed."""


@torch.no_grad()
def fill(engine: Engine, weights: Weights) -> None:
    """What `Engine.initialise` promises, for any engine."""
    for piece, tensor in engine.state().items():
        kind, _, name = piece.tensor.partition("/")
        if kind == "param":
            tensor.copy_(weights(name, engine.atlas.by_name[piece.tensor].shape, piece.box))
        else:
            tensor.zero_()
    engine.loaded(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to train. `checks.check` says which values go together."""

    schedule: str = "1f1b"
    num_microbatches: int = 1
    wrapping: Wrapping = field(default_factory=Wrapping)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


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
            numbers(whole),
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
        self._leaves = Leaves(self._stages, atlas=self.atlas, aliases=self._aliases, mesh=mesh)
        self._adamw = AdamW(
            self._leaves.trained(), betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
        )
        self._pieces = {  # made once: it is asked for between two steps
            piece: getattr(self._leaves.slots[name], kind)
            for piece in self.atlas.held(mesh.rank)
            for kind, _, name in [piece.tensor.partition("/")]
        }

    def forward_backward(self, tokens_BT: Tensor, labels_BT: Tensor, *, num_tokens: int) -> Tensor:
        """See `Engine`."""
        assert not self._leaves.collected, "forward_backward after grad_square_sum needs update or discard in between"
        tokens, labels = self._microbatches(tokens_BT), self._microbatches(labels_BT)
        return self._total(self._runner.train(tokens, labels, num_tokens=num_tokens))

    def evaluate(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """See `Engine`."""
        return self._total(self._runner.evaluate(self._microbatches(tokens_BT), self._microbatches(labels_BT)))

    def grad_square_sum(self) -> Tensor:
        """See `Engine`."""
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            for leaf, gradient in self._leaves.gradients()
            if leaf.counts
        ]
        return torch.stack(squares).sum() if squares else self._zero()

    def update(self, *, step: int, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        gradients = {id(leaf.slot.param): gradient for leaf, gradient in self._leaves.gradients()}
        if grad_scale != 1.0 and gradients:
            torch._foreach_mul_(list(gradients.values()), grad_scale)
        self._adamw.update(gradients, step=step, lr=lr)
        self._leaves.discard()
        self._leaves.refresh_copies()

    def discard(self) -> None:
        """See `Engine`."""
        self._leaves.discard()

    def state(self) -> dict[Piece, Tensor]:
        """See `Engine`."""
        return dict(self._pieces)

    def initialise(self, weights: Weights) -> None:
        """See `Engine`."""
        fill(self, weights)

    def loaded(self, step: int) -> None:
        """See `Engine`."""
        self._leaves.discard()
        self._leaves.refresh_copies()

    def close(self) -> None:
        """See `Engine`."""
        self._leaves.discard()
        self._stages.clear()
        self._pieces.clear()
        del self._runner, self._adamw, self._leaves

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

    def _microbatches(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        return microbatches(x_BT, self._options.num_microbatches, self._mesh.device)

    def _total(self, sums: list[Tensor]) -> Tensor:
        """The replica's sum on its first tensor-parallel rank; zero elsewhere, and where the loss is not."""
        if not sums or self._mesh.seat[2]:
            return self._zero()
        return torch.stack(sums).double().sum()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._mesh.device)


def numbers(whole: nn.Module) -> ModelNumbers:
    """What a model is, for `checks.check`."""
    table = getattr(whole.embed, "weight", None)
    return ModelNumbers(
        num_layers=len(whole.layers),  # type: ignore[arg-type]
        vocab_size=None if table is None else table.shape[0],
        num_heads=getattr(whole, "num_heads", None),
        num_kv_heads=getattr(whole, "num_kv_heads", None),
    )


def microbatches(x_BT: Tensor, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """A replica's samples in `count` equal parts, on the device. Raises ValueError if they do not divide."""
    if x_BT.shape[0] % count:
        raise ValueError(
            f"forward_backward: samples of a replica must divide by layout.num_microbatches {count}, "
            f"got {x_BT.shape[0]}; pad with samples whose labels are -100"
        )
    return x_BT.to(device).chunk(count)
