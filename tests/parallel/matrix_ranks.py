"""What the ranks of the layout matrix do: train and save, or load what others saved, save it again, and train on."""

from __future__ import annotations

from typing import Any

from torch._C._distributed_c10d import Store

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from fault_tolerance.checkpoints.index import ShardEntry
from fault_tolerance.checkpoints.shard import write_shard
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.parallel.ranks import WHOLE, Job, engine_for, step_once

AFTER = 10 if WHOLE else 2  # the first loss is of the weights that were loaded, the second of the moments too
IN_FULL = {0, 1}  # loads that all of these follow: into a new engine, and into one that has trained on. One loss follows the others

Said = tuple[ShardEntry, list[float]]


def make(store: Store, rank: int, generation: int, job: Job, directory: str) -> Said:
    """Train `job.steps` steps, save, and train `AFTER` more: their losses are what a load must give."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=60)
    engine = engine_for(job, mesh)
    for step in range(1, job.steps + 1):
        step_once(job, mesh, engine, step)
    said = save(engine, rank, directory), _losses(job, mesh, engine, AFTER)
    engine.close()
    mesh.close()
    return said


def take(store: Store, rank: int, generation: int, job: Job, sources: list[str], targets: list[str]) -> list[Said]:
    """Load each of the sources in turn, in one engine; what it then holds is saved to the target. Afterwards it trains on."""
    mesh = Mesh.connect(store, rank=rank, layout=Layout.parse(job.layout), generation=generation, timeout_s=60)
    engine = engine_for(job, mesh)
    said = []
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        checkpoint = Checkpoint.open(source)
        checkpoint.read_into(engine.state())
        engine.loaded(checkpoint.step)
        said.append((save(engine, rank, target), _losses(job, mesh, engine, AFTER if WHOLE or number in IN_FULL else 1)))
    engine.close()
    mesh.close()
    return said


def save(engine: Engine, rank: int, directory: str) -> ShardEntry:
    """A rank's share, out of live memory."""
    state = engine.state()
    owned: list[tuple[Any, Any]] = [
        (piece, state[home][piece.box.within(home.box)].contiguous()) for piece, home in engine.atlas.shares(rank)
    ]
    return write_shard(directory, f"rank{rank}", owned, specs=engine.atlas.specs)


def _losses(job: Job, mesh: Mesh, engine: Engine, count: int) -> list[float]:
    return [step_once(job, mesh, engine, step)[0] for step in range(job.steps + 1, job.steps + 1 + count)]
