"""Snapshotter: a worker's end of a snapshot. It copies the rank's state to the vault while the rank trains on.

    step s:  update | begin(s) ------------------------------------- gate() | update
                        forward, backward of s + 1                     ^
                        background: copy, copy, copy, copied -> staged |  waits only if the copy is not done yet

How to use it, once a generation's plan is open on the vaults:

    snapshotter = Snapshotter(plan, rank=rank, secret=secret)
    ...
    if agreed_by_all(snapshotter.ready()):                     # e.g. in an all-reduce that happens anyway
        snapshotter.begin(step, {"samples": 4096}, engine.state())
    ...
    stall_s = snapshotter.gate()                               # just before anything writes to the state
    snapshotter.close()                                        # at the end of the generation

`begin` returns at once. Between `begin` and `gate` nobody may write to the tensors. Trouble with the vault never
raises in the training loop. If the vault is lost, or the generation is over, `failure` says so, `ready()` is False from
then on, and the controller, who sees the vault die, decides. If it was only too slow for one snapshot, that one is given
up on all nodes (`missed` says why) and the next one is tried. All ranks must begin the same steps: a step that some rank
skips is never protected.

On a GPU the copy is on a stream of its own, straight into the vault's memory if that can be pinned (`device_copy.py`); `gate`
returns when the device's memory has been read.

Rule of this file: it reads tensors and writes its slab. Hashing, digests and coding are the vault's work, in its own
process, so they cost the training process nothing.
Source: the lazy copy with a gate before the update is DataStates-LLM's (HPDC 2024).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fault_tolerance.snapshots.arena import CONTROL_WORDS, PAGE, map_shared
from fault_tolerance.snapshots.device_copy import DeviceCopy
from fault_tolerance.snapshots.pace import Pace
from fault_tolerance.snapshots.slab import Entry
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.wire import Refused, WireError, connect, local_address
from parallel.atlas import Piece

COPY_BYTES = 4 << 20
GATE_S = 5.0
PASSING = ("old", "busy")  # refusals of one snapshot, not of this rank
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class _Job:
    step: int
    extra: dict[str, Any]
    tensors: dict[Piece, torch.Tensor]
    copied: threading.Event = field(default_factory=threading.Event)
    copying: bool = False
    given_up: bool = False
    begin_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Gated:
    """The gate of a step's snapshot has been passed; the vault is told how long it took."""

    step: int
    stall_s: float


class Snapshotter:
    """One rank, one generation. All methods are for the training thread."""

    def __init__(
        self,
        plan: SnapshotPlan,
        *,
        rank: int,
        secret: bytes,
        copy_bytes_s: float | None = None,
        timeout_s: float = 30.0,
        gate_s: float = GATE_S,
    ) -> None:
        """Attach to this node's vault. `copy_bytes_s` paces the copy, so that it disturbs the compute less; `gate_s` is how long the
        gate waits for a vault that does not say where to copy to.

        Raises WireError if the vault does not answer, Refused if this generation is over there.
        """
        self._plan, self.rank, self._slab = plan, rank, plan.slab(rank)
        self._base = plan.base_of(rank)
        widths = {entry.home: entry.nbytes // entry.piece.box.size for entry in self._slab.entries}
        self._expected = [(home, torch.Size(home.box.shape), width) for home, width in widths.items()]
        self._ranges = [(entry, _skip(entry)) for entry in self._slab.entries]
        self._pace, self._gate_s = Pace(copy_bytes_s), gate_s
        self.failure = ""
        self.missed = ""
        self.stall_s = 0.0
        self.copy_s = 0.0
        self._lock = threading.Lock()
        self._devices: DeviceCopy | None = None
        self._segments: dict[int, NDArray[np.uint8]] = {}
        self._staged: tuple[int, NDArray[np.uint8]] | None = None
        address = local_address(plan.run, plan.seats[rank])
        self._channel = connect(address, run=plan.run, secret=secret, timeout_s=timeout_s)
        try:
            self._attach()
        except (WireError, Refused):
            self._channel.close()
            raise
        self._job: _Job | None = None
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | _Gated | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="snapshotter")
        self._thread.start()

    def ready(self) -> bool:
        """Whether the vault has room for another version now. Costs nothing: it reads a word of shared memory."""
        busy = self._job is not None and not self._job.copied.is_set()
        return not self.failure and not busy and self._word("ready") == 1 and not self.fenced

    @property
    def fenced(self) -> bool:
        """Whether a newer generation is open, so that this one is over."""
        return self._word("generation") != self._plan.generation

    @property
    def protected(self) -> int | None:
        """The newest step of this generation that any tolerated loss leaves decodable."""
        return self._word("protected") - 1 if self._word("protected") else None

    def begin(self, step: int, extra: dict[str, Any], tensors: Mapping[Piece, torch.Tensor]) -> None:
        """Start copying. `tensors` are the rank's live memory by held piece, `extra` is small JSON data.

        Raises ValueError if a tensor is missing or has another shape than the atlas says.
        """
        self.gate()
        began = time.monotonic()
        self._check(tensors)
        job = _Job(step, dict(extra), dict(tensors))
        if any(t.is_cuda for t in job.tensors.values()):
            self._devices = self._devices if self._devices is not None else DeviceCopy(COPY_BYTES)
            self._devices.begin(job.tensors.values())
        self._job = job
        self._jobs.put(job)
        job.begin_s = time.monotonic() - began

    def gate(self) -> float:
        """Wait until the tensors may be written again. Returns the seconds that the snapshot has held training up.

        That is this wait and the time that `begin` took; 0 if no snapshot was begun since the last gate.
        If the vault has not even said where to copy to within `gate_s`, the snapshot is given up instead.
        """
        job = self._job
        if job is None:
            return 0.0
        began = time.monotonic()
        if not job.copied.wait(self._gate_s) and not self._give_up(job):
            job.copied.wait()
        self.stall_s, self.copy_s = job.begin_s + time.monotonic() - began, job.copy_s
        self._job = None
        self._jobs.put(_Gated(job.step, self.stall_s))
        return self.stall_s

    def staged(self, step: int) -> dict[Piece, torch.Tensor]:
        """What was copied of this step, after `gate`: the pieces that this rank saves whole. Valid until the next `begin`."""
        if self._staged is None or self._staged[0] != step:
            return {}
        view = self._staged[1]
        return {
            e.home: torch.from_numpy(view[self._base + e.offset :][: e.nbytes]).view(torch.float32)
            for e in self._slab.entries
            if e.piece == e.home and e.nbytes == 4 * e.piece.box.size
        }

    def cost_s(self) -> float:
        """What the last snapshot cost this rank: its stall, and a tenth of the copy's time for memory bandwidth."""
        return self.stall_s + 0.1 * self.copy_s

    def close(self) -> None:
        """Let go of the vault's memory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.gate()
        self._jobs.put(None)
        self._thread.join(GATE_S)
        if not self._thread.is_alive():
            self._staged = None
            if self._devices is not None:
                self._devices.close()
            self._segments.clear()  # unmapped: from here on the vault may lend them to others
            with contextlib.suppress(WireError, Refused):
                self._channel.call({"op": "detach"}, wait_s=GATE_S)
        self._channel.close()

    # ---- the background thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.failure:
                    continue
                if isinstance(job, _Job):
                    self._stage(job)
                else:
                    self._channel.call({"op": "gated", "step": job.step, "stall_s": job.stall_s})
            except Refused as refused:
                if refused.kind in PASSING:
                    self.missed = f"step {job.step}: {refused}"
                else:
                    self.failure = f"step {job.step}: {refused}"
            except (WireError, RuntimeError, OSError) as error:
                self.failure = f"step {job.step}: {error}"
            finally:
                if isinstance(job, _Job):
                    self._land(job)

    def _land(self, job: _Job) -> None:
        """Nothing reads the tensors any more, whatever became of the copy."""
        try:
            if self._devices is not None:
                self._devices.finish()
        except RuntimeError as error:  # the device itself has failed
            self.failure = self.failure or f"step {job.step}: {error}"
        job.tensors = {}
        job.copied.set()

    def _stage(self, job: _Job) -> None:
        view = self._segment(job.step)
        began = time.monotonic()
        with self._lock:
            job.copying = not job.given_up
        if job.given_up:
            self._channel.call({"op": "give_up", "step": job.step, "reason": self.missed})
            return
        if self._devices is not None and self._slab.entries:
            self._devices.pin(view[self._base : self._base + self._slab.nbytes])
        for entry, skip in self._ranges:
            start = self._base + entry.offset
            self._copy(job, entry, skip, view[start : start + entry.nbytes])
        if self._devices is not None:
            self._devices.finish()
        job.copy_s = time.monotonic() - began
        self._staged = (job.step, view)
        job.tensors = {}
        job.copied.set()
        request = {"op": "staged", "step": job.step, "extra": job.extra, "copy_s": job.copy_s}
        self._channel.call(request)

    def _give_up(self, job: _Job) -> bool:
        """Forget a snapshot whose copy has not begun. False if it has."""
        with self._lock:
            if job.copying:
                return False
            job.given_up = True
            self.missed = f"step {job.step}: the vault must answer within {self._gate_s:g} s, and did not"
            return True

    def _segment(self, step: int) -> NDArray[np.uint8]:
        """The memory to copy into; mapped when it is seen first."""
        request = {"op": "begin", "step": step, "known": list(self._segments)}
        answer, _ = self._channel.call(request)
        if answer["fresh"]:
            self._map(answer["id"], answer["nbytes"])
        return self._segments[answer["id"]]

    def _copy(self, job: _Job, entry: Entry, skip: int | None, target: NDArray[np.uint8]) -> None:
        tensor = job.tensors[entry.home]
        if skip is not None and tensor.is_cpu and tensor.is_contiguous():
            self._copy_bytes(tensor.data_ptr() + skip, target)
        else:
            self._copy_rows(tensor, entry, target)

    def _copy_bytes(self, source: int, target: NDArray[np.uint8]) -> None:
        """From one range of memory to another: nearly all pieces, at a tenth of the interpreter's time."""
        address = target.__array_interface__["data"][0]
        for start in range(0, len(target), COPY_BYTES):
            self._may_go_on()
            length = min(COPY_BYTES, len(target) - start)
            self._pace(length)
            ctypes.memmove(address + start, source + start, length)

    def _copy_rows(self, tensor: torch.Tensor, entry: Entry, target: NDArray[np.uint8]) -> None:
        box = entry.piece.box
        source = carrier(tensor)[box.within(entry.home.box)]
        out = target.view(f"u{source.element_size()}").reshape(box.shape)
        for rows in _row_ranges(box.shape, source.element_size()):
            self._may_go_on()
            part = out[rows] if box.shape else out
            self._pace(part.nbytes)
            shard = source[rows] if box.shape else source
            if self._devices is not None and shard.is_cuda:
                self._devices.copy(shard, part)
            else:
                np.copyto(part, shard.numpy().view(part.dtype))

    def _may_go_on(self) -> None:
        if self.fenced:
            raise Refused("fenced", "a newer generation is open")

    # ---- attaching

    def _attach(self) -> None:
        request = {"op": "attach", "rank": self.rank, "generation": self._plan.generation}
        answer, _ = self._channel.call(request)
        [control] = self._channel.recv_fds(1)
        try:
            self._control = map_shared(control, PAGE, write=False).view(np.uint64)
        finally:
            os.close(control)
        for identity, nbytes in answer["segments"]:
            self._map(identity, nbytes)

    def _map(self, identity: int, nbytes: int) -> None:
        [fd] = self._channel.recv_fds(1)
        try:
            self._segments[identity] = map_shared(fd, nbytes, write=True)
        finally:
            os.close(fd)

    def _word(self, name: str) -> int:
        return int(self._control[CONTROL_WORDS.index(name)])

    def _check(self, tensors: Mapping[Piece, torch.Tensor]) -> None:
        for home, shape, width in self._expected:
            tensor = tensors.get(home)
            if tensor is None or tensor.shape != shape or tensor.element_size() != width:
                found = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"snapshot: {home.tensor} must have shape {tuple(shape)}, {width} bytes an element, got {found}")


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width, which numpy knows for every dtype."""
    return tensor.detach().view(CARRIERS[tensor.element_size()])


def _skip(entry: Entry) -> int | None:
    """Where a piece begins in the memory of its contiguous home, in bytes; None if it is not one range of it."""
    piece, home = entry.piece.box, entry.home.box
    if not piece.shape:
        return 0
    if piece.shape[1:] != home.shape[1:]:
        return None
    return (piece.start[0] - home.start[0]) * (entry.nbytes // piece.shape[0])


def _row_ranges(shape: tuple[int, ...], width: int) -> Iterator[slice]:
    """Ranges of rows that make pieces of about COPY_BYTES."""
    if not shape:
        yield slice(None)
        return
    row = max(1, width * math.prod(shape[1:]))
    rows = max(1, COPY_BYTES // row)
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


