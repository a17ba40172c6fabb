"""Trainer: the loop of one rank, from the step it starts at to the step it is told to end at.

    forward, backward -> report -> gate -> update -> snapshot begins -> row
                          |         |                 |
                          |         |                 copies in the background, during the next forward and backward
                          |         waits only for that copy: the update is about to overwrite what it reads
                          one all-reduce: loss, gradient norm, and what all ranks must agree on (stop? test?)

Everything that ranks decide together is computed by each of them from the sums of that one all-reduce, so they
always agree, and a snapshot or a stop costs no collective of its own.

Rule of this file: it trains. It does not know Ray, other generations, or why it is asked to stop.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fault_tolerance.detection.numerics import Remedy
from fault_tolerance.snapshots.interval import Interval
from framework.drills.faults import FaultInjector
from framework.training.integrity import Integrity
from framework.training.numeric_guard import NumericGuard
from framework.training.staging import FAILED_S
from parallel.atlas import Piece
from parallel.engine import Engine

NOTICED = 0.05  # of a step: what it is held up for less than that is in its row, and no event


class Feed(Protocol):
    """The samples of every step, as a function of the step alone."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """tokens_BT and labels_BT (int64, -100 where ignored) of this rank's data-parallel share of a step (1-based)."""

    def share(self, shares: Sequence[int]) -> None:
        """From the next batch that is asked for, data-parallel replica i takes `shares[i]` samples; empty: all alike."""

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of the held-out samples, as batches of equal shape on all ranks."""


class Snapshots(Protocol):
    """Where the state goes in the background (`fault_tolerance.snapshots.snapshot`)."""

    def ready(self) -> bool: ...

    def begin(self, step: int, extra: dict[str, Any], tensors: dict[Piece, Tensor]) -> None: ...

    def gate(self) -> float: ...

    def protected(self) -> int: ...

    def await_protected(self, step: int) -> float: ...

    def await_end(self, step: int, patience_s: float) -> float: ...

    def cost_s(self) -> float: ...

    def copy_s(self) -> float: ...

    def has_room(self) -> bool: ...

    def staged(self, step: int) -> dict[Piece, Tensor]: ...

    def why_not_ready(self) -> str: ...


class Record(Protocol):
    """Where it is noted what this rank does (`framework.training.recording`)."""

    def ready(self) -> bool: ...

    def begin(self) -> object: ...

    def mark(self, step: int, phase: str) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The numbers the loop needs. `tokens_per_step` is that of the global batch.

    `interval` is how often to snapshot, by what one costs and a step takes, in seconds; 0 steps means never. One is taken
    whenever `durable_every` steps are full, too, for storage. With `max_steps_lost`, training waits rather than be further
    ahead of the newest protected snapshot. `dp`: how many replicas share the global batch. `mfu` is the model FLOPs utilisation
    of a step of so many seconds, on the rank that reports.
    """

    num_steps: int
    global_batch: int
    tokens_per_step: int
    grad_clip: float
    eval_every: int
    held_out_tokens: int
    interval: Callable[[float, float], Interval]
    max_skips: int
    durable_every: int = 0
    max_steps_lost: int | None = None
    dp: int = 1
    mfu: Callable[[float], float] | None = None
    spike_sigma: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended for this rank: `finished`, `stopped` or `held` (asked to, at a step boundary), `diverged` or `corrupt`.

    `held`: the state of `step` is in the engine and nowhere else. Of the last two: `clean` is the newest step whose state is
    believed, `ranks` who is at fault, as far as that is known.
    """

    kind: str
    step: int
    val_loss: float | None = None
    clean: int = -1
    ranks: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What all ranks know after a step's backward pass, equal on all of them."""

    loss: float
    grad_norm: float
    stop: bool
    hold: bool
    defer: bool
    record: bool
    test: bool
    wanted: bool
    behind: bool
    corrupt: bool
    snapshot_cost_s: float
    step_time_s: float
    shares: tuple[int, ...] = ()


class Trainer:
    """One rank's loop. `run` blocks; `request_stop`, `request_test`, `progress` and `abandon` may be called from other threads."""

    def __init__(
        self,
        *,
        engine: Engine,
        feed: Feed,
        learning_rate: Callable[[int], float],
        snapshots: Snapshots | None,
        faults: FaultInjector,
        sum_over_ranks: Callable[[Tensor], Tensor],
        num_ranks: int,
        settings: TrainSettings,
        emit: Callable[[dict[str, Any]], None],
        record: Record | None = None,
        reseed: Callable[[int], None] = lambda step: None,
        pair_test: Callable[[], dict[str, Any]] = dict,
        integrity: Integrity | None = None,
        untold: Callable[[], list[dict[str, Any]]] = list,
        rank: int = 0,
    ) -> None:
        self._engine, self._feed, self._lr = engine, feed, learning_rate
        self._snapshots, self._faults, self._settings = snapshots, faults, settings
        self._sum, self._num_ranks, self._emit, self._record = sum_over_ranks, num_ranks, emit, record
        self._reseed, self._untold = reseed, untold
        self._pair_test, self._integrity, self._rank = pair_test, integrity, rank
        self._guard = NumericGuard(spike_sigma=settings.spike_sigma, max_skips=settings.max_skips)
        self._own_loss = 0.0
        self._changed = ""
        self._shares: tuple[int, ...] = ()  # samples of each replica; empty: all alike
        self._new_shares: tuple[int, ...] | None = None
        self._stop, self._test, self._want, self._hold = (threading.Event() for _ in range(4))
        self._pass_s = 0.0
        self._last_step_s = 0.0
        self._last_snapshot = -1
        self._start = 0
        self._stall_s = 0.0
        self._said_every = 0
        self._kept = 0
        self.progress: tuple[int, str] = (0, "start")

    def request_stop(self) -> None:
        """Ask all ranks, through this one, to end at the next step boundary."""
        self._stop.set()

    def request_hold(self) -> None:
        """Ask for an end at the next step boundary without a snapshot, for there is a vault that would not take it. Asked of all ranks."""
        self._hold.set()

    @property
    def holding(self) -> bool:
        """Whether no snapshot is to be waited for any more."""
        return self._hold.is_set()

    def request_snapshot(self) -> None:
        """Have all ranks take a snapshot at the next step boundary, whatever the interval says."""
        self._want.set()

    def request_test(self) -> None:
        """Ask all ranks, through this one, for a pair test at the next step boundary."""
        self._test.set()

    def request_shares(self, shares: Sequence[int]) -> None:
        """Have all ranks, told through this one alone, share the global batch like this from the next step on; empty: alike."""
        self._new_shares = tuple(shares)

    def run(self, step: int) -> Outcome:
        """Train from `step` optimizer steps taken to `num_steps`. Raises RuntimeError when a collective fails."""
        self._start = self._kept = step
        if self._settings.interval(0.0, 0.0).steps > 0:
            self._snapshot(step, must=True)
        began = time.monotonic()
        while step < self._settings.num_steps:
            report = self._pass(step + 1)
            if report.record and self._record is not None:
                self._record.begin()  # all ranks are here, between the same two operations
            if report.corrupt:
                return self._corrupt(step)
            remedy, report = self._judged(step + 1, report)
            if remedy is Remedy.STOP:
                return Outcome("diverged", step, clean=self._kept, reason=f"loss {report.loss}, gradient norm {report.grad_norm}")
            if remedy is Remedy.KEEP:
                self._update(step + 1, report)
                self._kept = step + 1
                odd, reason = ((), "") if self._integrity is None else self._integrity.settle(step + 1)
                if odd:
                    return Outcome("corrupt", step + 1, clean=self._clean(), ranks=odd, reason=reason)
            step += 1
            self._last_step_s = time.monotonic() - began
            self._emit(self._row(step, report) | ({} if remedy is Remedy.KEEP else {"skipped": True}))
            began = time.monotonic()  # what a snapshot costs counts in the step after it
            if report.hold:
                return Outcome("held", step)
            last = step == self._settings.num_steps or report.stop
            if last or self._due(step, report):
                self._take(step, report, last=last)
            evaluating = time.monotonic()
            val_loss = self._evaluate(step)
            began += time.monotonic() - evaluating
            if report.test:
                self._phase(step, "test")
                self._test.clear()
                self._emit({"event": "pair_test", "step": step, **self._pair_test()})
            if report.stop and step < self._settings.num_steps:
                return Outcome("stopped", step, val_loss)
        return Outcome("finished", step, self._evaluate(step, final=True))

    def _pass(self, step: int) -> Report:
        """Forward, backward and the one report all-reduce of a step."""
        self._reseed(step)
        self._stall_s = 0.0
        self._phase(step, "forward", expected_s=self._pass_s)
        self._faults.at(step, "backward", expected_s=self._pass_s)
        began = time.monotonic()
        tokens, labels = self._feed.batch(step)
        loss = self._engine.forward_backward(tokens, labels, num_tokens=self._settings.tokens_per_step)
        self._pass_s = time.monotonic() - began
        if self._faults.poisoned():
            loss = loss * math.nan
        self._phase(step, "report")
        self._own_loss = float(loss)
        self._changed = "" if self._integrity is None else self._integrity.changed()
        defer = self._snapshots is not None and not self._snapshots.ready()
        cost = 0.0 if self._snapshots is None else self._snapshots.cost_s()
        behind = self._is_behind(step)
        said = (
            self._stop.is_set(),
            self._hold.is_set(),
            defer,
            self._record is not None and self._record.ready(),
            self._test.is_set(),
            bool(self._changed),
            self._want.is_set() or (behind and not defer),  # none is on its way: the last one was given up
            behind,
        )
        wanted, used = self._new_shares, self._shares
        local = [*map(float, said), cost, self._last_step_s, *self._as_numbers(wanted)]
        sums = torch.stack([loss.double(), self._engine.grad_square_sum().double()])
        sums = torch.cat([sums, torch.tensor(local, dtype=torch.float64, device=sums.device)])
        loss_sum, square_sum, stop, hold_sum, defer_sum, ready_sum, test_sum, changed_sum, want_sum, behind_sum, cost_sum, time_sum, *told = (
            self._sum(sums).tolist()
        )
        if self._integrity is not None and changed_sum == 0:
            self._integrity.passed()
        if self._new_shares is wanted:  # else it was asked for anew meanwhile
            self._new_shares = None
        self._take_shares(step, told)
        return Report(
            loss=loss_sum / self._settings.tokens_per_step,
            grad_norm=math.sqrt(square_sum) if square_sum >= 0 else math.nan,
            stop=stop > 0,
            hold=hold_sum > 0,
            defer=defer_sum > 0,
            record=ready_sum == self._num_ranks,
            test=test_sum > 0,
            wanted=want_sum > 0,
            behind=behind_sum > 0,
            corrupt=changed_sum > 0,
            snapshot_cost_s=cost_sum / self._num_ranks,
            step_time_s=time_sum / self._num_ranks,
            shares=used,
        )

    def _as_numbers(self, shares: tuple[int, ...] | None) -> list[float]:
        """What this rank adds to the report's sum to have the batch shared so: one rank says it, the others say zeros."""
        dp = self._settings.dp
        if dp == 1 or shares is None:
            return [0.0] * dp
        return [float(n) for n in shares] if shares else [-1.0] * dp

    def _take_shares(self, step: int, told: Sequence[float]) -> None:
        """All ranks heard the same at the same step, so all take their next batch accordingly."""
        shares = tuple(round(n) for n in told if n > 0)
        if not any(told) or shares == self._shares:
            return
        self._shares = shares
        self._feed.share(shares)
        each = f"{', '.join(map(str, shares))} samples" if shares else "equally many samples"
        reason = f"data-parallel replicas take {each} of a global batch from step {step + 1} on"
        self._emit({"event": "shares", "step": step, "shares": list(shares), "reason": reason})

    def _judged(self, step: int, report: Report) -> tuple[Remedy, Report]:
        """Whether a step is to be applied; one that is not believed is computed once more, from the same state.

        The parameters are untouched: the update has not happened, so nothing needs to be read back.
        """
        decision = self._guard.judge(report.loss, report.grad_norm)
        while decision.remedy is not Remedy.KEEP:
            ranks = self._ranks_where(not math.isfinite(self._own_loss))
            reason = decision.reason + (f"; not a number on rank {', '.join(map(str, ranks))}" if ranks else "")
            self._emit({
                "event": "numerics", "step": step, "reason": reason, "action": str(decision.remedy), "ranks": ranks,
                "loss": report.loss, "grad_norm": report.grad_norm,
            })  # fmt: skip
            self._engine.discard()
            if decision.remedy is not Remedy.RETRY:
                break
            report = self._pass(step)
            decision = self._guard.judge(report.loss, report.grad_norm)
        return decision.remedy, report

    def _corrupt(self, step: int) -> Outcome:
        """Some rank's state has changed though nobody wrote to it."""
        ranks = self._ranks_where(bool(self._changed))
        reason = f"the training state of rank {', '.join(map(str, ranks))} changed after step {step} though nobody wrote to it"
        if self._changed:
            print(f"integrity: {self._changed} of this rank has changed since step {step}", flush=True)
        clean = step if self._is_well_kept(step) else self._clean()
        return Outcome("corrupt", step, clean=clean, ranks=ranks, reason=reason)

    def _is_well_kept(self, step: int) -> bool:
        """Whether the snapshot of this step was copied before anything changed, on all ranks. A collective."""
        well = not self._changed
        if self._changed and self._snapshots is not None and self._integrity is not None:
            self._snapshots.gate()
            well = self._integrity.well_kept(self._snapshots.staged(step))
        return not self._anywhere(not well)

    def _clean(self) -> int:
        return -1 if self._integrity is None else self._integrity.clean

    def _ranks_where(self, here: bool) -> tuple[int, ...]:
        """The ranks on which it is so. A collective."""
        flags = torch.zeros(self._num_ranks, dtype=torch.float64)
        flags[self._rank] = float(here)
        return tuple(self._sum(flags).nonzero().flatten().tolist())

    def _update(self, step: int, report: Report) -> None:
        self._phase(step, "gate")
        if self._snapshots is not None:
            self._stall_s = self._snapshots.gate() + (self._hold_back(step) if report.behind and not report.hold else 0.0)
        self._phase(step, "optimizer")
        clip = self._settings.grad_clip
        scale = min(1.0, clip / (report.grad_norm + 1e-6)) if clip > 0 else 1.0
        self._engine.update(step=step, lr=self._lr(step), grad_scale=scale)

    def _is_behind(self, step: int) -> bool:
        """Whether, with this step, more would be lost than may be: all ranks then wait, before they take it, for what is on its way."""
        most = self._settings.max_steps_lost
        return most is not None and self._snapshots is not None and step - max(self._start, self._snapshots.protected()) > most

    def _hold_back(self, step: int) -> float:
        assert self._snapshots is not None and self._settings.max_steps_lost is not None, "only then somebody is behind"
        self._phase(step, "protection")
        least = step - self._settings.max_steps_lost
        waited = self._snapshots.await_protected(least)
        if self._anywhere(self._snapshots.protected() < least):  # it was given up, most often for a node or vault that is lost
            waited += self._snapshots.await_end(least, FAILED_S)
            self._anywhere(self._snapshots.protected() < least)  # raises if the generation is over: the step is not taken
        if waited > NOTICED * self._last_step_s:
            reason = f"a step was held up: snapshots take longer than fault_tolerance.max_steps_lost={self._settings.max_steps_lost} allows"
            self._emit({"event": "snapshot", "step": step, "held_up_s": waited, "reason": reason})
        return waited

    def _due(self, step: int, report: Report) -> bool:
        if self._snapshots is None:
            return False
        interval = self._settings.interval(report.snapshot_cost_s, report.step_time_s)
        due = interval.steps > 0 and step - max(self._last_snapshot, 0) >= interval.steps
        if due and interval.reason and abs(interval.steps - self._said_every) * 4 > self._said_every:
            self._said_every = interval.steps
            self._emit({"event": "snapshot", "step": step, "every_steps": interval.steps, "reason": interval.reason})
        durable, before = self._settings.durable_every, max(self._last_snapshot, 0)
        return due or report.wanted or (durable > 0 and step // durable > before // durable)

    def _take(self, step: int, report: Report, *, last: bool) -> None:
        most = self._settings.max_steps_lost
        must = last or (most is not None and step + 1 - self._last_snapshot > most)
        if report.defer and not must:
            assert self._snapshots is not None, "only snapshots defer"
            if self._anywhere(not self._snapshots.ready()):  # since the report the one before may have come through
                self._emit({"event": "snapshot", "step": step, "skipped": True, "reason": self._snapshots.why_not_ready()})
                return
        self._snapshot(step, must=must)

    def _snapshot(self, step: int, *, must: bool) -> None:
        """Begin a snapshot; one that must be taken waits until all ranks have room for it."""
        if self._snapshots is None or step == self._last_snapshot:
            return
        self._phase(step, "staging")
        self._snapshots.gate()
        while must and self._anywhere(not self._snapshots.has_room()):
            if self._anywhere(self._hold.is_set()):
                return
            time.sleep(0.01)
        samples = step * self._settings.global_batch
        self._snapshots.begin(step, {"step": step, "samples": samples, "rows": self._untold()}, self._engine.state())
        self._last_snapshot = step
        self._want.clear()
        for phase in ("encode", "transfer"):
            self._faults.at(step, phase, expected_s=self._snapshots.copy_s())

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank. A collective: asked before a snapshot that must be taken, since a vault has
        no more room for it as soon as another rank has begun it.
        """
        return self._sum(torch.tensor([float(here)], dtype=torch.float64)).item() > 0

    def _evaluate(self, step: int, *, final: bool = False) -> float | None:
        every = self._settings.eval_every
        due = final or (every > 0 and step % every == 0 and step < self._settings.num_steps)
        if not due or self._settings.held_out_tokens == 0:
            return None
        self._phase(step, "evaluate")
        total = torch.zeros((), dtype=torch.float64)
        for tokens, labels in self._feed.held_out():
            total = total + self._engine.evaluate(tokens, labels).double().cpu()
        loss = self._sum(total.reshape(1)).item() / self._settings.held_out_tokens
        self._emit({"event": "evaluation", "step": step, "val_loss": loss})
        return float(loss)

    def _phase(self, step: int, phase: str, *, expected_s: float = 0.0) -> None:
        self.progress = (step, phase)
        if self._record is not None:
            self._record.mark(step, phase)
        self._faults.at(step, phase, expected_s=expected_s)

    def _row(self, step: int, report: Report) -> dict[str, Any]:
        settings = self._settings
        return {
            "step": step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": self._lr(step),
            "tokens": step * settings.tokens_per_step,
            "samples": [(step - 1) * settings.global_batch, step * settings.global_batch - 1],
            "step_time_s": self._last_step_s,
            "tokens_per_s": settings.tokens_per_step / self._last_step_s,
            "snapshot_stall_ms": 1e3 * self._stall_s,
            **({"shares": list(report.shares)} if report.shares else {}),
            **({} if settings.mfu is None else {"mfu": settings.mfu(self._last_step_s)}),
        }
