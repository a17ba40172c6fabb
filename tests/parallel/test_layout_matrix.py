"""Every layout loads what every other saved: the same logical bytes, and the same losses from there on.

The model is chosen so that nothing divides: an odd vocabulary and width, tied embeddings, fewer key and value heads.
Each layout trains, saves and goes on; each layout, with one engine, loads all of them in turn. The first two loads of
an engine are followed by two losses, the others, which do the same to it, by one; HOLDFAST_WHOLE=1 compares ten after each load.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from fault_tolerance.checkpoints.checkpoint import Checkpoint, commit
from parallel.assemble import meta
from parallel.specs import state_specs
from tests.parallel.harness import Pool
from tests.parallel.matrix_ranks import make, take
from tests.parallel.ranks import TINY, Job

pytestmark = pytest.mark.slow

MODEL = TINY | {"vocab_size": 257, "dim": 40, "num_kv_heads": 2, "ffn_dim": 68, "tie_embeddings": True}
BASE = Job(model=MODEL, num_microbatches=2, samples=6, seq_len=16, steps=2)
LAYOUTS = {
    "1x1x1": BASE,
    "1x2x1": BASE.but(layout="1x2x1"),
    "1x3x1": BASE.but(layout="1x3x1"),
    "1x1x2": BASE.but(layout="1x1x2"),
    "1x1x4": BASE.but(layout="1x1x4"),
    "2x1x1": BASE.but(layout="2x1x1"),
    "2x2x1 zbv": BASE.but(layout="2x2x1", schedule="zbv_zero_bubble"),
    "2x1x2 interleaved": BASE.but(layout="2x1x2", schedule="interleaved_1f1b"),
    "4x1x1": BASE.but(layout="4x1x1", num_microbatches=4),
    "zero 1 x3": BASE.but(layout="1x3x1", zero={"stage": 1}),
    "zero 2 x2": BASE.but(layout="1x2x1", zero={"stage": 2, "offload_optimizer": True}),
    "zero 3 x4": BASE.but(layout="1x4x1", zero={"stage": 3}),
}


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, list[float]]]:
    """For each layout: its checkpoint, the digest of that, and the losses of the steps after it."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for name, job in LAYOUTS.items():
        directory = str(root / name.replace(" ", "_") / "step_000002")
        said = pool.run(make, job, directory, world=job.world, timeout_s=240)
        checkpoint = _commit(directory, [entry for entry, _ in said])
        found[name] = directory, checkpoint.state_sha256(), said[0][1]
    return found


@pytest.mark.parametrize("target", LAYOUTS)
def test_a_layout_loads_what_all_others_saved(
    pool: Pool, saved: dict[str, tuple[str, str, list[float]]], target: str, tmp_path: Path
) -> None:
    job = LAYOUTS[target]
    sources = [directory for directory, _, _ in saved.values()]
    targets = [str(tmp_path / f"step_{i:06d}") for i in range(len(sources))]
    ranks = pool.run(take, job, sources, targets, world=job.world, timeout_s=300)
    for i, (source, (_, digest, losses)) in enumerate(saved.items()):
        again = _commit(targets[i], [rank[i][0] for rank in ranks])
        assert again.state_sha256() == digest, f"{source} -> {target}"
        after = ranks[0][i][1]
        assert after and after == pytest.approx(losses[: len(after)], rel=1e-5), f"{source} -> {target}"


def _commit(directory: str, entries: list) -> Checkpoint:  # type: ignore[type-arg]
    specs = state_specs(meta(functools.partial(BASE.target, **MODEL)))
    return commit(directory, entries, specs=specs, extra={"step": BASE.steps})
