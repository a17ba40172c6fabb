"""What becomes of verdicts: events that name, trouble where it is certain, and nothing costly without proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fault_tolerance.detection.verdict import Kind, Topology, Verdict
from framework import run_dir
from framework.config import decode
from framework.control.broken_ways import BrokenWays
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.plan import Plan, Seat, Source
from framework.trouble.response import Response
from framework.trouble.weighing import Costs, Outlook, Tried
from parallel.layout import Layout
from tests.fault_tolerance.detection import lossy

CONFIGS = Path(__file__).parents[3] / "configs"
NODES = ("n0", "n1", "n2", "n3")
PLAN = Plan(
    run="r",
    generation=1,
    layout=Layout(1, 4, 1),
    schedule="1f1b",
    num_microbatches=1,
    seats=tuple(Seat(node, 0) for node in NODES),
    domains={},
    tolerate=1,
    source=Source("fresh", 0),
    options=(),
    reason="",
)
SLOW = Verdict(Kind.SLOW_COMPUTE, (2,), ("n2",), "rank 2 is slow", severity=3.0)
HUNG = Verdict(Kind.HANG, (1,), ("n1",), "rank 1 never came")


class Seen:
    """A sentinel that sees what it is told to."""

    def __init__(self) -> None:
        self.now: tuple[Verdict, ...] = ()
        self.fresh: list[Verdict] = []
        self.failure = ""
        self.topology = Topology(PLAN.layout, NODES)
        self.step_s, self.computing = 0.3, {0: 0.1, 1: 0.1, 2: 0.3, 3: 0.1}
        self.changed: list[tuple[int, bool]] = []

    def see(self, *verdicts: Verdict) -> None:
        self.fresh += [v for v in verdicts if v not in self.now]
        self.now = verdicts

    def take(self) -> list[Verdict]:
        fresh, self.fresh = self.fresh, []
        return fresh

    def active(self) -> tuple[Verdict, ...]:
        return self.now

    def explain(self) -> list[Verdict]:
        return list(self.now)

    def step_times(self, verdict: Verdict) -> tuple[float, float]:
        return 0.3, 0.1

    def work_changed(self, step: int, *, alike: bool) -> None:
        self.changed.append((step, alike))
        self.now = ()

    def computing_s(self) -> dict[int, float]:
        return self.computing

    def pids(self) -> dict[int, int]:
        return {}

    def close(self) -> None: ...


def _no_gauge() -> None:
    raise AssertionError("nobody exports gauges here")


class Scene:
    """A response, what it sees, how far the run is, and the tests that were asked for."""

    def __init__(self, directory: Path, global_batch: int = 4, **changed: Any) -> None:
        tree = yaml.safe_load((CONFIGS / "train.yaml").read_text())
        tree = {key: item for key, item in tree.items() if key not in ("defaults", "hydra")} | {"run_dir": str(directory)}
        groups = {"model": "tiny", "data": "synthetic", "optim": "adamw", "layout": "default", "cluster": "local"}
        for group, choice in (groups | {"fault_tolerance": "default", "monitor": "default"}).items():
            tree[group] = yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text())
        tree["monitor"] |= {"wandb": "disabled"}
        tree["detect"] |= changed
        tree["optim"] |= {"global_batch": global_batch}
        self.directory, self.seen, self.asked = directory, Seen(), 0
        self.shares: list[tuple[int, ...]] = []
        config = decode(tree)
        self.lost: set[tuple[str, str]] = set()
        self.ways = BrokenWays(dict.fromkeys(NODES), probe=lambda agents: lossy.seen(agents, self.lost), again_s=60.0)  # type: ignore[arg-type]
        self.journal = Journal(config, "r", gauge=_no_gauge)
        self.response = Response(
            config, self.journal, PLAN, {}, sentinel=self.seen, request_test=self._ask,  # type: ignore[arg-type]
            without=lambda node: Outlook(spare=True, ratio=1.0), costs=Costs(2.0, 8.0), tried=Tried(), ways=self.ways,
            request_shares=lambda shares: self.shares.append(tuple(shares)),
        )  # fmt: skip

    def _ask(self) -> None:
        self.asked += 1

    def reach(self, step: int) -> None:
        row = {"step": step, "loss": 1.0, "step_time_s": 0.1, "samples": [0, 1], "generation": 1, "layout": "1x4x1"}
        self.journal.take([row], PLAN)

    def test(self, step: int, compute: list[float]) -> None:
        assert self.response.heard([{"event": "pair_test", "step": step, "compute": compute, "ways": []}]) == []

    def verdicts(self) -> list[dict[str, Any]]:
        return [e for e in run_dir.events(self.directory) if e["kind"] == "verdict"]


@pytest.fixture
def scene(tmp_path: Path) -> Callable[..., Scene]:
    return lambda **changed: Scene(tmp_path / "run", **changed)


def test_a_hang_is_told_once_and_is_trouble(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.seen.see(HUNG)
    trouble = at.response.look()
    assert isinstance(trouble, Trouble) and (trouble.kind, trouble.ranks, trouble.nodes) == ("hang", (1,), ("n1",))
    at.response.look()
    assert [(e["cause"], e["ranks"]) for e in at.verdicts()] == [("hang", [1])]


def test_a_way_that_is_stuck_gets_neither_end_killed(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.seen.see(Verdict(Kind.LINK_HANG, (0, 1), ("n0", "n1"), "stuck", link=(0, 1)))
    trouble = at.response.look()
    assert trouble is not None and (trouble.kind, trouble.ranks) == ("hang", ())
    assert at.verdicts()[0]["link"] == [0, 1]


def test_a_hang_without_a_place_gets_the_dead_way_that_the_machines_find(scene: Callable[..., Scene]) -> None:
    """In an all-gather of four the records named all four, and the next crew waited until the way was back."""
    at = scene()
    at.lost = {("n1", "n2")}
    at.seen.see(Verdict(Kind.LINK_HANG, (0, 1, 2, 3), NODES, "all came, and it does not end"))
    trouble = at.response.look()
    assert trouble is not None and (trouble.kind, trouble.ranks, trouble.nodes) == ("hang", (), ("n1", "n2"))
    assert trouble.ways == (("n1", "n2"),) and str(trouble).startswith("hang: way n1>n2: ")
    [told] = at.verdicts()
    assert (told["cause"], told["link"], told["nodes"]) == ("link_hang", [1, 2], ["n1", "n2"])
    assert [d.ends for d in at.ways.dead] == [("n1", "n2")]


def test_a_collective_that_broke_and_names_nobody_has_the_machines_asked(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.lost = {("n3", "n0")}
    trouble = at.response.explained(Trouble("crash", (), (), "a collective broke", 7, 0.0, 3.0))
    assert (trouble.nodes, trouble.ways) == (("n3", "n0"), (("n3", "n0"),))
    assert 3.0 < trouble.silent_s < 4.0 and trouble.detected_at > 0.0, "the seconds of asking count"
    assert "a collective broke" in trouble.evidence


def test_a_crew_that_does_not_come_to_a_first_step_has_its_machines_asked(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.lost = {("n1", "n2")}
    assert at.response.look() is None and at.response._ways._round is None, "it has hardly begun"
    at.response._began -= 6
    assert at.response.look() is None
    assert at.ways._round is not None
    at.ways._round.join(10)
    trouble = at.response.look()
    assert trouble is not None and trouble.ways == (("n1", "n2"),)
    assert "has taken no step for 6 s" in trouble.evidence and not trouble.planned


def test_a_crew_that_stands_still_has_its_machines_asked_where_no_record_tells_why(scene: Callable[..., Scene]) -> None:
    """Snapshots had the dead way to themselves: all ranks waited, as `max_steps_lost` asks, for one that could not be sent, no
    operation hung, and for a minute and a half nobody looked.
    """
    at = scene()
    at.lost = {("n1", "n2")}
    at.reach(3)
    at.response._began -= 600
    assert at.response.look() is None and at.ways._round is None, "it steps"
    at.journal._last_step_at -= 6
    assert at.response.look() is None and at.ways._round is not None
    at.ways._round.join(10)
    trouble = at.response.look()
    assert trouble is not None and trouble.ways == (("n1", "n2"),)


def test_nobody_is_asked_because_steps_are_long_and_what_came_too_late_is_dropped(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.lost = {("n1", "n2")}
    at.reach(3)
    at.response._began -= 600
    at.journal._last_step_at -= 6
    assert at.response.look() is None and at.ways._round is not None
    at.ways._round.join(10)
    at.reach(4)
    assert at.response.look() is None and at.ways._round is None
    at.journal._step_times.extend([20.0] * 9)
    at.journal._last_step_at -= 60
    assert at.response.look() is None and at.ways._round is None


def test_a_machine_whose_ways_keep_being_stuck_is_left_out(scene: Callable[..., Scene]) -> None:
    """A direction that was dropped between two hosts hung every new crew in the same place, until the run gave up."""
    at = scene()
    at.response._tried.stuck += [("n1", "n3"), ("n2", "n1")]
    at.seen.see(Verdict(Kind.LINK_HANG, (0, 1), ("n0", "n1"), "stuck", link=(0, 1)))
    trouble = at.response.look()
    assert trouble is not None and (trouble.ranks, trouble.nodes, trouble.remedy) == ((), ("n1",), "swap")


def test_who_is_slow_is_tested_and_without_proof_left_alone(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.reach(20)
    at.seen.see(SLOW)
    assert at.response.look() is None and at.asked == 1
    at.test(21, [0.01, 0.01, 0.0101, 0.01])
    assert at.response.look() is None and at.asked == 1  # not asked again at once
    assert [e.get("confirmed") for e in at.verdicts()] == [None, False]
    at.reach(80)
    at.response.look()
    assert at.asked == 2  # it still looks slow after four times as long


def test_who_is_slow_and_proved_so_is_replaced_when_as_much_is_lost_as_it_costs(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.reach(16)
    at.seen.see(SLOW)
    at.response.look()
    at.test(16, [0.01, 0.01, 0.03, 0.01])
    assert at.response.look() is None  # 8 steps of 0.2 s lost, 2 s to change
    at.reach(40)
    at.response._cases[SLOW.key].weigh_at_s = 0.0
    trouble = at.response.look()
    assert trouble is not None and (trouble.kind, trouble.nodes, trouble.remedy) == ("slow_compute", ("n2",), "swap")
    assert trouble.planned
    last = at.verdicts()[-1]
    assert last["action"] == "swap" and len(last["comparison"]) == 3
    assert last["comparison"][-1] == "rebalance: no, each replica has one row a microbatch (4 samples, dp 4, 1 microbatches)"


def balanced(scene: Callable[..., Scene], **given: Any) -> Scene:
    """A crew of four replicas that share 32 samples unequally from step 18 on, for rank 2 is slow."""
    at = scene(global_batch=32, **given)
    at.reach(16)
    at.seen.see(SLOW)
    at.response.look()
    at.test(16, [0.01, 0.01, 0.03, 0.01])
    assert at.response.look() is None
    assert at.shares == [(10, 10, 3, 9)] and at.verdicts()[-1]["action"] == "rebalance"
    [said] = at.response.heard([{"event": "shares", "step": 17, "shares": [10, 10, 3, 9], "reason": "replicas take"}])
    assert said["before_s"] == 0.3 and said["expected_s"] < 0.2 and at.seen.changed == [(16, False), (17, False)]
    at.seen.step_s, at.seen.computing = 0.15, {0: 0.125, 1: 0.125, 2: 0.13, 3: 0.115}
    return at


def test_a_slow_replica_takes_fewer_samples_before_anything_dearer_is_done(scene: Callable[..., Scene]) -> None:
    at = balanced(scene)
    at.reach(30)
    assert at.response.look() is None
    [told] = [e for e in run_dir.events(at.directory) if e["kind"] == "shares"]
    assert told["after_s"] == pytest.approx(0.13) and told["shares"] == [10, 10, 3, 9]
    assert [e["action"] for e in at.verdicts()] == ["test", "rebalance"]


@pytest.mark.parametrize(("rank", "seconds", "why"), [(2, 0.04, "rank 2 computes 0.31 times"), (0, 0.25, "rank 0 computes 2.00 times")])
def test_unequal_shares_end_when_somebody_computes_otherwise_than_with_them_at_first(
    scene: Callable[..., Scene], rank: int, seconds: float, why: str
) -> None:
    """The slow one is well again, or somebody else is slow too: shares are equal again, and all are judged anew."""
    at = balanced(scene)
    for step in (30, 35, 36):
        at.reach(step)
        at.response.look()
    at.seen.computing[rank] = seconds
    for step in (40, 47):
        at.reach(step)
        at.response.look()
    assert at.shares[1:] == []
    at.reach(48)
    at.response.look()
    assert at.shares[1:] == [()]
    [said] = at.response.heard([{"event": "shares", "step": 49, "shares": [], "reason": "alike"}])
    assert why in said["reason"] and at.seen.changed[-1] == (49, True)
    at.seen.see(SLOW)
    at.response.look()
    assert at.asked == 2


def test_one_look_that_saw_little_neither_sets_the_shares_nor_ends_them(scene: Callable[..., Scene]) -> None:
    """A worker with a third of the time was seen as 2.86 times as slow, then as 1.70; shares were dealt by the 1.70 and given up at once,
    for it computed longer with them than it had in that look.
    """
    at = scene(global_batch=32)
    at.reach(16)
    at.seen.see(SLOW)
    at.response.look()
    at.test(16, [0.01, 0.01, 0.03, 0.01])
    at.seen.see(replace(SLOW, severity=1.6))
    at.seen.computing = {0: 0.1, 1: 0.1, 2: 0.16, 3: 0.1}
    at.response.look()
    assert at.shares == [(10, 9, 4, 9)], "by 2.3, the mean"
    at.response.heard([{"event": "shares", "step": 17, "shares": [10, 9, 4, 9], "reason": "replicas take"}])
    at.seen.computing = {0: 0.12, 1: 0.12, 2: 0.18, 3: 0.12}
    at.reach(30)
    at.response.look()
    assert len(at.shares) == 1 and not at.response._tried.unequal


def test_shares_that_do_not_help_are_taken_back_and_not_tried_again(scene: Callable[..., Scene]) -> None:
    at = balanced(scene)
    at.seen.computing[2] = 0.29
    at.reach(30)
    at.response.look()
    assert at.shares[1:] == [()] and "does not help" in at.response._tried.unequal["n2"]
    at.response.heard([{"event": "shares", "step": 31, "shares": [], "reason": "alike"}])
    at.seen.see(SLOW)
    at.response.look()
    at.test(32, [0.01, 0.01, 0.03, 0.01])
    at.response.look()
    assert at.shares[1:] == [()]
    assert any("does not help" in line for line in at.verdicts()[-1]["comparison"])


def test_what_is_dearer_than_unequal_shares_comes_when_it_pays(scene: Callable[..., Scene]) -> None:
    at = balanced(scene)
    at.reach(30)
    assert at.response.look() is None
    at.reach(50)
    at.response._cases[SLOW.key].weigh_at_s = 0.0
    trouble = at.response.look()
    assert trouble is not None and trouble.remedy == "swap"


def test_a_rank_that_runs_out_of_memory_with_a_larger_share_keeps_to_equal_ones(scene: Callable[..., Scene]) -> None:
    at = balanced(scene)
    at.response.explained(Trouble("crash", (0,), ("n0",), "OutOfMemoryError: CUDA out of memory", 20, 0.0))
    assert "out of memory" in at.response._tried.unequal[""]


def test_an_observer_names_and_does_nothing(scene: Callable[..., Scene]) -> None:
    at = scene(action="observe")
    at.reach(40)
    at.seen.see(SLOW)
    assert at.response.look() is None and at.asked == 0
    assert [(e["cause"], e["action"]) for e in at.verdicts()] == [("slow_compute", "observe")]


def test_a_broken_collective_that_names_nobody_is_explained_by_the_records(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.seen.see(HUNG)
    told = at.response.explained(Trouble("crash", (), (), "a collective broke", 7, 0.0, 3.0))
    assert (told.kind, told.ranks, told.silent_s) == ("hang", (1,), 3.0)


def test_what_the_controller_saw_by_itself_is_a_verdict_too(scene: Callable[..., Scene]) -> None:
    at = scene()
    lost = Trouble("node_loss", (3,), ("n3",), "n3 gone with all its processes", 7, 0.0)
    assert at.response.explained(lost) == lost
    assert [(e["cause"], e["ranks"], e["nodes"]) for e in at.verdicts()] == [("node_loss", [3], ["n3"])]
