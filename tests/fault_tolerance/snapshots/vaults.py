"""Vaults as real processes, and small states to put into them, for the tests of snapshots."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.catalogue import Catalogue, catalogue
from fault_tolerance.snapshots.restore import Reader, RestoreStats, share
from fault_tolerance.snapshots.snapshot import Snapshotter
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault_client import VaultClient
from fault_tolerance.snapshots.wire import Refused, WireError
from parallel.atlas import STATE_KINDS, Atlas, TensorSpec
from parallel.layout import Layout

ROOT = Path(__file__).parents[3]
NUM_LAYERS = 4
Tensors = dict[str, torch.Tensor]


def specs(width: int = 24) -> tuple[TensorSpec, ...]:
    """A small model's state: embedding, matrices cut either way, norms, a scalar, and sizes that do not divide."""
    params: list[tuple[str, tuple[int, ...], int | None, tuple[int, ...]]] = [
        ("embed", (2 * width + 1, width), 0, (0, NUM_LAYERS + 1))
    ]
    for layer in range(NUM_LAYERS):
        params.append((f"{layer}.wide", (width, 2 * width), 0, (layer + 1,)))
        params.append((f"{layer}.deep", (width - 1, 2 * width), 1, (layer + 1,)))
        params.append((f"{layer}.norm", (width,), None, (layer + 1,)))
    params.append(("scale", (), None, (NUM_LAYERS + 1,)))
    return tuple(
        TensorSpec(f"{kind}/{name}", shape, "float32", tp_dim, units)
        for kind in STATE_KINDS
        for name, shape, tp_dim, units in params
    )


def atlas_of(layout: str, *, width: int = 24, schedule: str = "1f1b") -> Atlas:
    """The atlas of `specs` under a layout, such as `2x2x1`, or `1x4x1 flat` for another sharding than rows."""
    degrees, _, sharding = layout.partition(" ")
    return Atlas(specs(width), Layout.parse(degrees), schedule, NUM_LAYERS, sharding or "rows")


def whole_state(atlas: Atlas, seed: int) -> dict[str, np.ndarray]:
    """Random bits for every tensor, so that NaNs, infinities and denormals are among them."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.integers(0, 1 << 32, spec.shape, dtype=np.uint32).view(np.float32).reshape(spec.shape)
        for spec in atlas.specs
    }


def shards(atlas: Atlas, rank: int, state: Mapping[str, np.ndarray]) -> Tensors:
    """A rank's live tensors."""
    return {
        piece: torch.from_numpy(np.array(state[piece.tensor][tuple(map(slice, piece.box.start, piece.box.stop))]))
        for piece in atlas.held(rank)
    }


def empty_shards(atlas: Atlas, rank: int) -> Tensors:
    """Tensors to restore into."""
    return {piece: torch.full(piece.box.shape, -7.0) for piece in atlas.held(rank)}


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Whether all tensors are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


class VaultProcess:
    """One `python -m fault_tolerance.snapshots.vault`."""

    def __init__(self, node: str, run: str, secret: bytes, *, module: Sequence[str] = ("fault_tolerance.snapshots.vault",)) -> None:
        command = [sys.executable, "-m", *module, "--node", node, "--run", run]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)  # type: ignore[call-overload]
        self.process.stdin.write(secret.hex() + "\n")
        self.process.stdin.flush()
        self.node = node
        self.client: VaultClient
        self._run, self._secret = run, secret

    def wait(self) -> VaultProcess:
        """Until it serves."""
        self.address = json.loads(self.process.stdout.readline())["address"]
        self.client = VaultClient(self.address, run=self._run, secret=self._secret)
        return self

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as its owner would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process.stdout.close()


class VaultCluster:
    """Vaults of one run, and ranks that stage into them from this process."""

    def __init__(self, num_nodes: int, *, run: str | None = None) -> None:
        self.run = run if run is not None else "t" + secrets.token_hex(4)
        self.secret = secrets.token_bytes(16)
        self.vaults: dict[str, VaultProcess] = {}
        self.snapshotters: list[Snapshotter] = []
        self.add(f"n{i}" for i in range(num_nodes))

    def add(self, nodes: Iterable[str], **options: Any) -> None:
        """Start vaults."""
        started = [VaultProcess(node, self.run, self.secret, **options) for node in nodes]
        self.vaults.update({vault.node: vault.wait() for vault in started})

    def __enter__(self) -> VaultCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
        for vault in self.vaults.values():
            vault.close()

    def plan(
        self,
        atlas: Atlas,
        *,
        tolerate: int,
        generation: int = 1,
        nodes: Sequence[str] | None = None,
        group_size: int | None = None,
        **options: Any,
    ) -> SnapshotPlan:
        """Ranks dealt out to the nodes in blocks."""
        names = list(nodes if nodes is not None else self.vaults)
        world = atlas.layout.world
        size = group_size if group_size is not None else max(len(names), tolerate + 1)
        return SnapshotPlan(
            run=self.run,
            generation=generation,
            atlas=atlas,
            seats=tuple(names[rank * len(names) // world] for rank in range(world)),
            groups=plan_groups(dict.fromkeys(names), tolerate=tolerate, group_size=size),
            addresses={name: self.vaults[name].address for name in names},
            **{"chunk_bytes": 4096, **options},
        )

    def open(self, plan: SnapshotPlan, *, attach: bool = True) -> None:
        """Open a plan everywhere and attach all ranks."""
        for node in plan.nodes:
            self.vaults[node].client.open(plan)
        if attach:
            self.detach()
            ranks = range(len(plan.seats))
            self.snapshotters = [Snapshotter(plan, rank=rank, secret=self.secret) for rank in ranks]

    def detach(self) -> None:
        """All ranks let go."""
        for snapshotter in self.snapshotters:
            snapshotter.close()
        self.snapshotters = []

    def stage(self, plan: SnapshotPlan, step: int, state: Mapping[str, np.ndarray]) -> None:
        """All ranks copy a state."""
        for rank, snapshotter in enumerate(self.snapshotters):
            snapshotter.begin(step, {"step": step, "samples": 8 * step}, shards(plan.atlas, rank, state))
        for snapshotter in self.snapshotters:
            snapshotter.gate()

    def protect(self, plan: SnapshotPlan, step: int, state: Mapping[str, np.ndarray], *, timeout_s: float = 30) -> None:
        """Stage a state and wait until it is protected everywhere."""
        wait_until(lambda: all(s.ready() for s in self.snapshotters), timeout_s)
        self.stage(plan, step, state)
        wait_until(lambda: all(s.protected == step for s in self.snapshotters), timeout_s)

    def catalogue(self, without: Iterable[str] = ()) -> Catalogue:
        """What the living vaults, but those in `without`, can give."""
        found = []
        for node, vault in self.vaults.items():
            if node not in set(without) and vault.process.poll() is None:
                try:
                    found.append(vault.client.inventory())
                except (WireError, Refused):
                    continue
        return catalogue(found, run=self.run)

    def restore(
        self, snapshot: Any, atlas: Atlas, *, node_of_rank: Sequence[str] | None = None
    ) -> tuple[list[Tensors], list[RestoreStats]]:
        """Every rank of a new layout reads its part; the sum of digests is checked against the one at capture."""
        total, tensors, stats = 0, [], []
        for rank in range(atlas.layout.world):
            node = node_of_rank[rank] if node_of_rank is not None else "elsewhere"
            reader = Reader(snapshot, node=node, secret=self.secret)
            tensors.append(empty_shards(atlas, rank))
            stats.append(reader.restore(atlas, rank, tensors[-1]))
            total += share(atlas, rank, tensors[-1])
            reader.close()
        assert total % (1 << 64) == snapshot.digest
        return tensors, stats


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Poll a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)


def said(client: VaultClient, kind: str, *, since: int = 0, **facts: Any) -> list[dict[str, Any]]:
    """The events of a kind, waited for: a vault acts first and speaks then."""

    def events() -> list[dict[str, Any]]:
        return [e for e in client.watch(since) if e["kind"] == kind and facts.items() <= e.items()]

    wait_until(events)
    return events()
