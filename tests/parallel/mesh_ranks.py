"""What the ranks of the mesh's tests do: train until they are severed, and see what is left of their connections."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store

from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.parallel.ranks import Job, Trained, engine_for, step_once, train


@dataclass(frozen=True)
class Survived:
    """What a survivor says: seconds from being severed to being out of the collective, and what it trained after."""

    error: str
    out_s: float
    after: Trained


def survive(store: Store, rank: int, generation: int, job: Job, lost: tuple[int, ...], after: Job) -> Survived:
    """Train forever until severed, then connect with the survivors under another layout and train there."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=8)
    severed = _sever_on_request(store, mesh, f"sever {generation}")
    error = _train_until_it_fails(store, rank, generation, job, mesh)
    severed.join(30)
    out_s = time.time() - float(store.get(f"sever {generation}").decode())
    mesh.close()
    survivors = [r for r in range(Layout.parse(job.layout).world) if r not in lost]
    return Survived(error, out_s, train(store, survivors.index(rank), generation + 1_000_000, after))


def _train_until_it_fails(store: Store, rank: int, generation: int, job: Job, mesh: Mesh) -> str:
    engine = engine_for(job, mesh)
    try:
        for step in range(1, 1_000_000):
            step_once(job, mesh, engine, step)
            store.set(f"steps {generation} {rank}", str(step))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def _sever_on_request(store: Store, mesh: Mesh, key: str) -> threading.Thread:
    def watch() -> None:
        while not store.check([key]):
            time.sleep(0.02)
        mesh.sever()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def alone_in_the_crowd(store: Store, rank: int, generation: int, arrive_s: float) -> str:
    """Wait for a peer who does not come. Returns the error."""
    try:
        Mesh.connect(store, rank=rank, layout=Layout(1, 2, 1), generation=generation, arrive_s=arrive_s)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def cut_only_its_own(store: Store, rank: int, generation: int) -> str:
    """Rank 0 severs; both see which connections still carry something. Returns what is wrong."""
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    mesh = Mesh.connect(store, rank=rank, layout=Layout(1, 2, 1), generation=generation, timeout_s=8)
    late = socket.create_connection(listener.getsockname())
    mesh.sum(torch.ones(1))
    cut = mesh.sever() if rank == 0 else 2
    try:
        mesh.sum(torch.ones(1))
        return "the mesh still works"
    except RuntimeError:
        pass
    mesh.close()
    store.set(f"alive {rank}", "yes")
    for a, b in ((ours, theirs), (client, server), (late, listener.accept()[0])):
        a.sendall(b"x")
        if b.recv(1) != b"x":
            return "a stranger's connection was cut"
    return "" if cut >= 2 else f"only {cut} connections were cut"


def train_and_count(store: Store, rank: int, generation: int, job: Job) -> tuple[int, int]:
    """Train, close, and count what this process has open: (descriptors, threads)."""
    train(store, rank, generation, job)
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))
