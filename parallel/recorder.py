"""Recorder: from now on every operation of every process group is noted in a ring that others can read.

    recorder = install(ring)            once per process, before any group is made
    recorder.mark(step, Phase.TRAIN)    the trainer, at each step's start and whenever it does something else
    recorder.abort()                    any thread: waiting ranks raise, new operations are refused

    init_process_group, DeviceMesh, new_group -> c10d._new_process_group_helper -> attach: the group's backend is wrapped

DDP, FSDP2, DTensor and pipeline schedules reach the wire through the group's backend, so all of them are seen. It is
registered under the backend type CUSTOM: under its own type c10d would silently keep the unwrapped one.

Without a C++ compiler there is no record: `install` says so in one line and the job runs as before, watched only by
liveness (`recorder.on` is False, `recorder.reason` tells why).

Rule of this file: results of operations do not change, and a failure to record is never a failure to train.
"""

from __future__ import annotations

import functools
import logging
import os
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from parallel.native import BuildError
from parallel.record import Group, Phase, group_line
from parallel.recorder_build import load
from parallel.ring import TABLE_BYTES, create, own_start_ticks, ring_bytes

log = logging.getLogger(__name__)

_HELPER = "_new_process_group_helper"
# c10d keeps one backend per type and group; types that no group of ours uses serve as names for the wrappers.
_FREE_TYPES = (dist.ProcessGroup.BackendType.CUSTOM, dist.ProcessGroup.BackendType.UCC)


class Recorder:
    """The record of this process. Made by `install`; a recorder that is off does nothing."""

    def __init__(self, extension: ModuleType | None, ring: Any, *, generation: int, reason: str) -> None:
        self._extension = extension
        self._ring = ring
        self._gates: list[Any] = []
        self.generation = generation
        self.reason = reason

    @property
    def on(self) -> bool:
        """Whether operations are recorded."""
        return self._extension is not None

    def mark(self, step: int, phase: Phase) -> None:
        """Note that the trainer has now taken `step` steps and enters `phase`. Costs a few microseconds, one read of /proc."""
        if self._ring is not None:
            self._ring.mark(step, int(phase))

    def abort(self) -> None:
        """Free every rank thread that waits in an operation of this process, and refuse new ones on these groups.

        The freed threads raise `torch.distributed.DistBackendError`; groups made after `install` was called again are
        not affected. Sockets stay open: shut them down too, so that gloo's own threads let go.
        """
        for gate in self._gates:
            gate.close()

    def attach(self, group: dist.ProcessGroup, ranks: list[int]) -> None:
        """Record an existing group; `ranks` are its world ranks in group order. `install` does it for new groups."""
        if self._extension is None:
            return
        name = f"{group.group_name}:{group.group_desc}"
        told = Group(zlib.crc32(f"{self.generation}/{name}/{ranks}".encode()), name, tuple(ranks))
        self._ring.add_line(group_line(told))
        wrapped: dict[int, tuple[Any, Any]] = {}
        for device in group._device_types:
            inner = group._get_backend(torch.device(device))
            if id(inner) not in wrapped and len(wrapped) < len(_FREE_TYPES):
                backend, gate = self._extension.wrap(inner, self._ring, told.id)
                wrapped[id(inner)] = (_FREE_TYPES[len(wrapped)], backend)
                self._gates.append(gate)
            if id(inner) in wrapped:
                group._register_backend(torch.device(device), *wrapped[id(inner)])

    def attach_all(self) -> None:
        """Record all groups that exist. Every rank must do it between the same two operations, or numbers differ."""
        for group, ranks in list(c10d._world.pg_group_ranks.items()):
            if isinstance(group, dist.ProcessGroup):  # there is a number among them for the groups of others
                self.attach(group, sorted(ranks, key=lambda rank: ranks[rank]))

    def close(self) -> None:
        """Stop recording new groups. Existing ones go on."""
        helper = getattr(c10d, _HELPER)
        if getattr(helper, "recorder", None) is self:
            setattr(c10d, _HELPER, helper.__wrapped__)


def install(
    ring: int | str | os.PathLike[str] | None = None,
    *,
    rank: int = -1,
    generation: int = 0,
    num_slots: int = 8192,
    compile: bool = True,
) -> Recorder:
    """Record all process groups made from now on into `ring`: a file or descriptor of the vault, None for a private one.

    `rank` is filled in by the first group if it is not known yet. Called again (for the next `generation`), the old
    record is overwritten. The first call on a machine compiles the extension (about 35 s); without `compile` the record is
    off instead. Raises ValueError if the
    file is too small for a ring, and OSError if it cannot be opened; a missing compiler is no error.
    """
    try:
        extension = load(compile=compile)
    except BuildError as error:
        log.warning("record: off, collectives are not watched: %s", error)
        return Recorder(None, None, generation=generation, reason=str(error))
    fd = _open(ring, num_slots)
    try:
        size = os.fstat(fd).st_size
        if size < ring_bytes(64):
            raise ValueError(
                f"recorder: the ring must have at least {ring_bytes(64)} bytes, got {size}; use ring.create"
            )
        memory = extension.Ring(fd, size, TABLE_BYTES)
    finally:
        if not isinstance(ring, int):
            os.close(fd)
    memory.reset(rank, os.getpid(), own_start_ticks(), generation)
    recorder = Recorder(extension, memory, generation=generation, reason=f"{memory.num_slots} slots")
    _hook(recorder)
    return recorder


def _open(ring: int | str | os.PathLike[str] | None, num_slots: int) -> int:
    if ring is None:
        return create("holdfast-ring", num_slots=num_slots)
    return ring if isinstance(ring, int) else os.open(ring, os.O_RDWR)


def _hook(recorder: Recorder) -> None:
    helper = getattr(c10d, _HELPER)
    original: Callable[..., Any] = helper.__wrapped__ if hasattr(helper, "recorder") else helper

    @functools.wraps(original)
    def new_process_group(
        group_size: int, group_rank: int, global_ranks_in_group: list[int], *args: Any, **kwargs: Any
    ) -> Any:
        made = original(group_size, group_rank, global_ranks_in_group, *args, **kwargs)
        group = made[0]
        if isinstance(group, dist.ProcessGroup):
            if not global_ranks_in_group:
                recorder._ring.set_rank(group_rank)
            recorder.attach(group, list(global_ranks_in_group) or list(range(group_size)))
        return made

    new_process_group.recorder = recorder  # type: ignore[attr-defined]
    setattr(c10d, _HELPER, new_process_group)
