"""One rank that trains for real, and numbers in it that go bad: what the loop does, and what comes of the state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from fault_tolerance.snapshots.interval import Interval
from framework.build import make_engine, make_feed, make_schedule, model_builder, open_data
from framework.config import decode
from framework.drills.faults import Fault, FaultInjector
from framework.trainer import Outcome, Trainer, TrainSettings
from framework.training.initial import InitialWeights
from framework.training.integrity import Integrity, flip_bit, sums_of
from parallel.assemble import meta
from parallel.layout import Layout
from parallel.mesh import Mesh

CONFIGS = Path(__file__).parents[2] / "configs"
NEVER = Interval(0, 0.0, 0.0, "never")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    connected = Mesh.connect(dist.HashStore(), rank=0, layout=Layout(1, 1, 1), generation=1)
    yield connected
    connected.close()


class Run:
    """Twelve steps of the tiny model on one rank."""

    def __init__(self, mesh: Mesh, tmp_path: Path, *, faults: tuple[Fault, ...] = (), every: int = 0, sigma: float | None = None):
        tree = yaml.safe_load((CONFIGS / "train.yaml").read_text())
        tree = {key: item for key, item in tree.items() if key not in ("defaults", "hydra")} | {"run_dir": str(tmp_path)}
        for group, choice in {"model": "tiny", "data": "synthetic", "optim": "adamw", "layout": "default", "cluster": "local"}.items():
            tree[group] = yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text())
        for group in ("fault_tolerance", "monitor"):
            tree[group] = yaml.safe_load((CONFIGS / group / "default.yaml").read_text())
        tree["layout"] |= {"pp": 1, "dp": 1}
        tree["optim"] |= {"global_batch": 2, "num_steps": 12}
        config = decode(tree)
        self.said: list[dict[str, Any]] = []
        engine = make_engine(config, mesh, schedule="1f1b", num_microbatches=1)
        engine.initialise(InitialWeights(meta(model_builder(config)), seed=0))
        watch = Integrity(engine.state, engine.atlas, rank=0, every=every, share=mesh.share) if every else None
        trainer = Trainer(
            engine=engine,
            feed=make_feed(config, open_data(config), dp=1, dp_index=0, num_microbatches=1),
            learning_rate=make_schedule(config).lr,
            snapshots=None,
            faults=FaultInjector(
                faults, directory=tmp_path / "drill", rank=0, node="n0", leads_node=True, acts={"flip_bit": lambda _: flip_bit(engine.state())}
            ),
            sum_over_ranks=mesh.sum,
            num_ranks=1,
            settings=TrainSettings(
                num_steps=12, global_batch=2, tokens_per_step=2 * config.data.seq_len, grad_clip=1.0, eval_every=0,
                held_out_tokens=0, interval=lambda cost_s, step_s: NEVER, max_skips=2, spike_sigma=sigma,
            ),
            emit=self.said.append,
            integrity=watch,
        )  # fmt: skip
        self.outcome: Outcome = trainer.run(0)
        self.sums = sums_of(engine.state())
        self.bad = [item for item in self.said if item.get("event") == "numerics"]
        engine.close()


@pytest.fixture(scope="module")
def plain(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """To which nothing happens."""
    return Run(mesh, tmp_path_factory.mktemp("plain"))


def test_a_loss_that_is_no_number_once_changes_nothing_of_the_result(mesh: Mesh, tmp_path: Path, plain: Run) -> None:
    spoilt = Run(mesh, tmp_path, faults=(Fault(step=5, kind="poison", rank=0),))
    assert [(b["step"], b["action"], b["ranks"]) for b in spoilt.bad] == [(5, "retry", (0,))]
    assert spoilt.outcome.kind == "finished" and not plain.bad
    assert spoilt.sums == plain.sums
    assert not any("skipped" in item for item in spoilt.said)


def test_a_batch_that_is_bad_twice_is_left_out_and_too_many_end_the_generation(mesh: Mesh, tmp_path: Path) -> None:
    bad = Fault(step=5, kind="poison", rank=0)
    run = Run(mesh, tmp_path / "a", faults=(bad, bad))
    assert [b["action"] for b in run.bad] == ["retry", "skip"]
    assert [row["step"] for row in run.said if row.get("skipped")] == [5]
    assert run.outcome.kind == "finished"
    run = Run(mesh, tmp_path / "b", faults=(bad,) * 5)
    assert [b["action"] for b in run.bad] == ["retry", "skip", "retry", "skip", "stop"]
    assert (run.outcome.kind, run.outcome.clean) == ("diverged", 4)


def test_a_bit_that_flips_ends_the_generation_before_it_is_trained_on(mesh: Mesh, tmp_path: Path) -> None:
    run = Run(mesh, tmp_path, faults=(Fault(step=8, kind="flip_bit", rank=0),), every=1)
    assert (run.outcome.kind, run.outcome.step, run.outcome.clean, run.outcome.ranks) == ("corrupt", 7, 6, (0,))
    assert "nobody wrote" in run.outcome.reason


def test_watching_over_the_bits_changes_nothing(mesh: Mesh, tmp_path: Path, plain: Run) -> None:
    assert Run(mesh, tmp_path, every=1).sums == plain.sums
