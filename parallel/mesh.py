"""Mesh: the ranks of one generation, connected, with a process group for each axis.

    store (one client for the life of the process)
      └ PrefixStore "generation 7"     fences everything of other generations off
          └ default group, all ranks   └ init_device_mesh (pp, dp, tp): one group per axis

The axes of the device mesh bear the generation in their names ("dp of 7"). DTensor caches what it works out about
a mesh for the life of the process, and knows meshes apart by ranks and names only; without the number, a cache entry
of an earlier generation, with its group *names*, would be taken for this one's, and ranks would talk in wrong groups.

Connecting happens in two waits: first everybody arrives at the store (as long as `arrive_s`), then groups are made
and from then on no operation waits longer than `timeout_s`. `sever` may be called from any thread, at any time: all that
waits in a collective raises, so that the process can go on in another generation.

Rule of this file: it connects and disconnects. It decides nothing, and it has never heard of why one would sever.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.forget import forget
from parallel.layout import AXES, Layout
from parallel.sockets import Address, listeners, pace, shut_down

SLICE_S = 0.5  # a wait at the store cannot be severed, so it is cut into these
ABORT_S = 8.0  # NCCL's abort waits for its kernels, which end at once when told to


class Mesh:
    """The connected ranks of one generation, as rank `rank` sees them. Made by `connect`."""

    def __init__(
        self,
        *,
        layout: Layout,
        rank: int,
        device: torch.device,
        devices: DeviceMesh,
        ends: tuple[set[Address], set[Address]],
    ) -> None:
        """Private: `ends` are the listeners of this rank and of its peers."""
        self.layout, self.rank, self.device, self.devices = layout, rank, device, devices
        self._names = dict(zip(AXES, devices.mesh_dim_names or (), strict=True))
        self.seat = layout.seat(rank)
        self._mine, self._theirs = ends
        self._groups = [dist.group.WORLD, *(devices.get_group(name) for name in devices.mesh_dim_names or ())]
        self._open, self._severed = True, False

    @staticmethod
    def connect(
        store: Store,
        *,
        rank: int,
        layout: Layout,
        generation: int,
        device: torch.device | str = "cpu",
        timeout_s: float = 8.0,
        arrive_s: float = 60.0,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Mesh:
        """Meet the other ranks of a generation and make the groups. Blocks until all are there.

        Raises RuntimeError (torch's) when somebody does not come within `arrive_s`, or fails while connecting, and soon
        after `given_up` says that there is no use in waiting for the others any more.
        A process has one mesh at a time, close the one before; and no generation twice.
        """
        device = _numbered(torch.device(device))
        place = PrefixStore(f"generation {generation}", store)
        _arrive(place, "arrived", rank, layout.world, "", arrive_s, given_up)
        before = listeners()
        names = tuple(f"{axis} of {generation}" for axis in AXES)
        devices = _make_groups(place, rank, layout, device, names, timedelta(seconds=timeout_s))
        mine = sorted(listeners() - before)
        try:
            everyone = _arrive(place, "listeners", rank, layout.world, json.dumps(mine), timeout_s, given_up)
        except BaseException:
            dist.destroy_process_group()
            raise
        theirs = {(str(host), int(port)) for text in everyone for host, port in json.loads(text)}
        return Mesh(layout=layout, rank=rank, device=device, devices=devices, ends=(set(mine), theirs))

    def axis(self, name: str) -> DeviceMesh:
        """The one-dimensional mesh of this rank's peers along `pp`, `dp` or `tp`."""
        return self.devices[self._names[name]]

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group of this rank's peers along `pp`, `dp` or `tp`."""
        return self.devices.get_group(self._names[name])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in a new tensor on the mesh's device; equal bits on every rank."""
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        if total.is_cuda:
            torch.cuda.current_stream(total.device).synchronize()
            if self._severed:  # NCCL's operations end without an error then, and without a result
                raise dist.DistBackendError("mesh: it was severed, so this is no sum")
        return total

    def share(self, value: object) -> list[Any]:
        """Everybody's value, by rank. Small things only: it is pickled and goes over the wire."""
        values: list[Any] = [None] * self.layout.world
        dist.all_gather_object(values, value)
        return values

    def sever(self) -> int:
        """Make every operation that waits on this mesh raise, now and later. Returns the number of cut connections.

        From any thread. The mesh is of no further use; `close` it from the thread that used it.
        """
        self._severed = True
        if self.device.type == "cuda":
            self._abort()
            return self.layout.world - 1
        return shut_down(mine=self._mine, theirs=self._theirs)

    def _abort(self) -> None:
        """Every group in a thread of its own: a kernel of one may stand in line behind a stuck one of another."""
        threads = [threading.Thread(target=group.abort, daemon=True) for group in self._groups if group is not None]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + ABORT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def pace(self, bytes_per_s: int) -> int:
        """Hold all that this rank sends on this mesh to a rate per connection. Returns the number of connections (gloo)."""
        return pace(mine=self._mine, theirs=self._theirs, bytes_per_s=bytes_per_s)

    def close(self) -> None:
        """Let go of the groups. Idempotent. After `sever` too; drop models and engines that use the mesh first."""
        if not self._open:
            return
        self._open = False
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        forget(self.devices)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next generation may have another rank, and with it this one's GPU, elsewhere


def _arrive(
    store: Store, what: str, rank: int, world: int, value: str, wait_s: float, given_up: Callable[[], bool]
) -> list[str]:
    """Leave a value for the others, wait until all have, and return theirs by rank."""
    store.set(f"{what}/{rank}", value)
    keys = [f"{what}/{peer}" for peer in range(world)]
    deadline = time.monotonic() + wait_s
    while True:
        try:
            store.wait(keys, timedelta(seconds=max(0.001, min(SLICE_S, deadline - time.monotonic()))))
            return [store.get(key).decode() for key in keys]
        except RuntimeError as error:
            late = isinstance(error, dist.DistStoreError) or type(error) is RuntimeError  # of a FileStore's timeout it is the bare one
            if not late or given_up() or time.monotonic() >= deadline:
                raise


def _numbered(device: torch.device) -> torch.device:
    """A GPU by its number: `cuda` alone is the present one."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _make_groups(
    store: Store, rank: int, layout: Layout, device: torch.device, names: tuple[str, ...], timeout: timedelta
) -> DeviceMesh:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.world, timeout=timeout)
    try:
        return init_device_mesh(
            device.type,
            (layout.pp, layout.dp, layout.tp),
            mesh_dim_names=names,
            backend_override={name: (backend, _options(backend, timeout)) for name in names},
        )
    except BaseException:
        dist.destroy_process_group()
        raise


def _options(backend: str, timeout: timedelta) -> Backend.Options:
    """Without these, groups of an axis wait for 30 minutes, whatever the default group's timeout is (torch 2.13)."""
    options: Backend.Options
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    return options
