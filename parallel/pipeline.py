"""Pipeline: the stages of a rank, run microbatch by microbatch under a schedule; and the plain loop where pp is 1.

    gpipe                 F0 F1 F2 F3 .. .. B0 B1 B2 B3        all forwards, then all backwards
    1f1b                  F0 F1 B0 F2 B1 F3 B2 B3              at most `stages` microbatches in flight
    interleaved_1f1b      two stages a rank: a smaller bubble
    *_zero_bubble         B split into input and weight gradients; the latter fill the bubble

Training is torch's `distributed.pipelining`. Evaluation is a chain of forwards of ours: no schedule needs to be
turned around for it, and all schedules evaluate alike.

Sources: GPipe (arXiv 1811.06965), 1F1B (1806.03377), interleaving (2104.04473), zero bubble (2401.10241).

Rule of this file: it calls modules and moves activations. It knows no parameters and no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.data import let_go, sync_on_this_backward
from parallel.loss import summed_cross_entropy, vocabulary_parallel
from parallel.stages import stages_of_rank

_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
}


class Runner(Protocol):
    """Runs the stages of this rank on a batch that is already cut into microbatches."""

    def train(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...], *, num_tokens: int) -> list[Tensor]:
        """Forward and backward of sum / num_tokens. Returns each microbatch's sum; none where the loss is not here."""

    def evaluate(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> list[Tensor]:
        """Forward alone, with the same result."""


class Accumulation:
    """No pipeline: one microbatch after the other, gradients reduced with the last."""

    def __init__(self, model: nn.Module, *, reshard_between: bool) -> None:
        """`reshard_between`: let go of gathered parameters after every microbatch, not only after the last."""
        self._model, self._reshard_between = model, reshard_between

    def train(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...], *, num_tokens: int) -> list[Tensor]:
        """See `Runner`."""
        sums = []
        for i, (tokens_BT, labels_BT) in enumerate(zip(tokens, labels, strict=True)):
            sync_on_this_backward(self._model, i == len(tokens) - 1, reshard=self._reshard_between)
            with vocabulary_parallel():
                loss = summed_cross_entropy(self._model(tokens_BT), labels_BT)
                (loss / num_tokens).backward()
            sums.append(loss.detach())
        return sums

    @torch.no_grad()
    def evaluate(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> list[Tensor]:
        """See `Runner`."""
        with vocabulary_parallel():
            sums = [summed_cross_entropy(self._model(t), y) for t, y in zip(tokens, labels, strict=True)]
        let_go(self._model)
        return sums


class Pipeline:
    """The stages of one pp rank under a schedule."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        *,
        schedule: str,
        group: dist.ProcessGroup,
        device: torch.device,
        stream: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        """`stages`: this rank's modules by stage, in chain order; `stream(batch, length)` the shape of the stream,
        and `dtype` its type, as they pass between stages."""
        self._stages, self._schedule, self._group, self._device = dict(stages), schedule, group, device
        self._stream, self._dtype = stream, dtype
        placement = stages_of_rank(schedule, group.size())
        self._rank_of = {stage: rank for rank, held in enumerate(placement) for stage in held}
        self._last = max(self._rank_of)
        self._schedules: dict[tuple[int, ...], _Trained] = {}

    def train(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...], *, num_tokens: int) -> list[Tensor]:
        """See `Runner`. The first call with a new shape of microbatches sets the schedule up for it."""
        key = (len(tokens), *tokens[0].shape)
        if key not in self._schedules:
            self._schedules[key] = self._set_up(*key)
        return self._schedules[key].run(tokens, labels, num_tokens=num_tokens)

    def _set_up(self, num_microbatches: int, batch: int, length: int) -> _Trained:
        stages = [self._torch_stage(index, batch, length) for index in self._stages]
        first, last = 0 in self._stages, self._last in self._stages
        return _Trained(self._schedule, stages, num_microbatches, first=first, last=last)

    def _torch_stage(self, index: int, batch: int, length: int) -> PipelineStage:
        """With all shapes given, so that no rank has to run the model to find them out."""
        stream = torch.empty(self._stream(batch, length), dtype=self._dtype, device="meta", requires_grad=True)
        tokens = torch.empty((batch, length), dtype=torch.int64, device="meta")
        return _Stage(
            self._stages[index],
            index,
            self._last + 1,
            self._device,
            input_args=tokens if index == 0 else stream,
            output_args=stream,
            group=self._group,
        )

    @torch.no_grad()
    def evaluate(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> list[Tensor]:
        """See `Runner`. Stage by stage in chain order, all microbatches through one before the next."""
        handed: list[Tensor] = list(tokens)
        sends: list[dist.Work] = []
        with vocabulary_parallel():
            for index in self._stages:
                handed = [self._forward(index, i, x, tokens[0].shape, sends) for i, x in enumerate(handed)]
            ours = self._last in self._stages
            sums = [summed_cross_entropy(x, y) for x, y in zip(handed, labels, strict=True)] if ours else []
        for send in sends:
            send.wait()
        for module in self._stages.values():
            let_go(module)
        return sums

    def _forward(self, index: int, i: int, x: Tensor, shape: torch.Size, sends: list[dist.Work]) -> Tensor:
        me = self._group.rank()
        if index > 0 and self._rank_of[index - 1] != me:
            x = torch.empty(self._stream(*shape), dtype=self._dtype, device=self._device)
            dist.recv(x, group=self._group, group_src=self._rank_of[index - 1])
        out: Tensor = self._stages[index](x)
        if index < self._last and self._rank_of[index + 1] != me:
            work = dist.isend(out.contiguous(), group=self._group, group_dst=self._rank_of[index + 1])
            assert work is not None
            sends.append(work)
        return out


class _Stage(PipelineStage):
    """One whose last output may have any shape: nobody receives it but the loss."""

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        if not self.is_last:  # of the last one torch 2.11 asks, too, that it be as said beforehand
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc, unused-ignore]


class _Trained:
    """A torch schedule for one shape of microbatches, with the loss that it calls."""

    def __init__(
        self, schedule: str, stages: list[PipelineStage], num_microbatches: int, *, first: bool, last: bool
    ) -> None:
        kind = _SCHEDULES[schedule]
        single = schedule in ("gpipe", "1f1b")
        self._schedule = kind(
            stages[0] if single else stages,  # type: ignore[arg-type]
            num_microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        self._first, self._last = first, last
        self._num_tokens = 1
        self._sums: list[Tensor] = []

    def run(self, tokens: tuple[Tensor, ...], labels: tuple[Tensor, ...], *, num_tokens: int) -> list[Tensor]:
        self._num_tokens, self._sums = num_tokens, []
        inputs = (torch.cat(tokens),) if self._first else ()
        target = torch.cat(labels) if self._last else None
        try:
            with vocabulary_parallel():
                self._schedule.step(*inputs, target=target, return_outputs=False)
        except RuntimeError as error:
            # Torch wraps what a stage raised in a text about the stage; whoever judges it needs what was raised.
            raise (error.__cause__ or error) from None
        sums, self._sums = self._sums, []
        return sums

    def _loss(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        loss = summed_cross_entropy(logits_BTV, labels_BT)
        self._sums.append(loss.detach())
        return loss / self._num_tokens
