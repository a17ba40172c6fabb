"""Faults on demand: each fires once, where it should, and for real."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from framework.drills.faults import Fault, FaultInjector, InjectedError, call, claim


def injector(faults: Sequence[Fault], directory: Path, *, rank: int = 0, leads: bool = True) -> FaultInjector:
    return FaultInjector(faults, directory=directory, rank=rank, node="n0", leads_node=leads)


def exit_code(work: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(10.0)
    return process.exitcode


def test_a_fault_is_claimed_by_one_process_only(tmp_path: Path) -> None:
    assert claim(tmp_path / "drill", 0)
    assert not claim(tmp_path / "drill", 0)
    assert claim(tmp_path / "drill", 1)


def test_a_fault_fires_at_its_step_and_phase_and_never_again(tmp_path: Path) -> None:
    fault = Fault(step=3, kind="raise", phase="optimizer", rank=0)
    first = injector([fault], tmp_path)
    first.at(3, "forward")
    first.at(2, "optimizer")
    with pytest.raises(InjectedError, match="step 3, phase optimizer"):
        first.at(3, "optimizer")
    first.at(3, "optimizer")
    injector([fault], tmp_path).at(3, "optimizer")  # the step is done again after a recovery


def test_a_fault_of_a_snapshot_that_was_left_out_fires_at_the_next_one(tmp_path: Path) -> None:
    """A machine was to be killed while step 10 was encoded; that snapshot was left out, and the run finished unhurt."""
    faults = injector([Fault(step=10, kind="raise", phase="encode", rank=0), Fault(step=10, kind="raise", phase="optimizer", rank=0)], tmp_path)
    faults.at(11, "optimizer")
    with pytest.raises(InjectedError):
        faults.at(11, "encode")
    faults.at(12, "encode")


def test_a_fault_of_a_node_is_fired_by_its_lowest_rank(tmp_path: Path) -> None:
    fault = Fault(step=1, kind="raise", phase="staging", node="n0")
    injector([fault], tmp_path, rank=5, leads=False).at(1, "staging")
    with pytest.raises(InjectedError):
        injector([fault], tmp_path, rank=4).at(1, "staging")


def test_a_fault_that_is_called_for_fires_at_its_step_or_the_first_after_it_and_once(tmp_path: Path) -> None:
    def on_call(rank: int = 0) -> FaultInjector:
        return FaultInjector([], directory=tmp_path, rank=rank, node="n0", leads_node=True, on_call=True)

    going, other = on_call(), on_call(rank=1)
    going.at(3, "forward")
    call(tmp_path, [Fault(step=4, kind="raise", phase="optimizer", rank=0)])
    call(tmp_path, [Fault(step=9, kind="raise", phase="forward", rank=0), Fault(step=5, kind="raise", phase="staging", rank=1)])
    going.at(4, "forward")
    with pytest.raises(InjectedError):
        going.at(6, "optimizer")
    going.at(8, "forward")
    going.at(9, "staging")
    with pytest.raises(InjectedError):
        other.at(5, "staging")
    later = on_call()  # the next generation
    later.at(7, "optimizer")
    with pytest.raises(InjectedError):
        later.at(9, "forward")
    injector([], tmp_path).at(9, "forward")  # not on call


def test_a_fault_of_recovery_waits_until_the_run_has_come_that_far(tmp_path: Path) -> None:
    faults = injector([Fault(step=5, kind="raise", phase="recovery", rank=0)], tmp_path)
    faults.recovering(4)
    with pytest.raises(InjectedError):
        faults.recovering(5)


def test_a_killed_worker_is_gone_by_sigkill(tmp_path: Path) -> None:
    def work() -> None:
        injector([Fault(step=1, kind="kill_worker", phase="optimizer", rank=0)], tmp_path).at(1, "optimizer")

    assert exit_code(work) == -signal.SIGKILL


def test_a_fault_inside_a_pass_fires_from_a_timer(tmp_path: Path) -> None:
    def work() -> None:
        injector([Fault(step=1, kind="kill_worker", phase="backward", rank=0)], tmp_path).at(1, "backward", expected_s=0.3)
        time.sleep(5.0)
        os._exit(0)

    began = time.monotonic()
    assert exit_code(work) == -signal.SIGKILL
    assert time.monotonic() - began > 0.2


@pytest.mark.parametrize(("phase", "after_s"), [("encode", 0.2), ("transfer", 0.3)])
def test_a_fault_while_a_snapshot_is_coded_or_on_its_way_waits_for_its_copy(phase: str, after_s: float, tmp_path: Path) -> None:
    """Both once fired as soon as the copy had begun, which was the one moment that neither of them meant."""

    def work() -> None:
        injector([Fault(step=1, kind="kill_worker", phase=phase, rank=0)], tmp_path).at(1, phase, expected_s=0.2)
        time.sleep(5.0)
        os._exit(0)

    began = time.monotonic()
    assert exit_code(work) == -signal.SIGKILL
    assert time.monotonic() - began > after_s


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "explode", "rank": 0}, "drill.faults.kind: must be one of kill_worker"),
        ({"kind": "raise", "rank": 0, "phase": "lunch"}, "drill.faults.phase: must be one of forward"),
        ({"kind": "raise"}, "exactly one of rank and node"),
        ({"kind": "raise", "rank": 0, "node": "n0"}, "exactly one of rank and node"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fault(step=1, **words)  # type: ignore[arg-type]


def test_what_happens_to_a_node_without_a_rank_is_done_by_rank_0(tmp_path: Path) -> None:
    """A dead machine cannot bring itself back."""
    done: list[str] = []
    fault = Fault(step=1, kind="add_node", phase="optimizer", node="n3")

    def armed(rank: int, seated: tuple[str, ...]) -> FaultInjector:
        acts = {"add_node": lambda f: done.append(f"rank {rank} adds {f.node}")}
        return FaultInjector(
            [fault], directory=tmp_path, rank=rank, node=f"n{rank}", leads_node=True, seated=seated, acts=acts
        )

    armed(1, ("n0", "n1")).at(1, "optimizer")
    armed(0, ()).at(1, "optimizer")  # who has a rank is not known
    assert done == []
    armed(0, ("n0", "n1")).at(1, "optimizer")
    assert done == ["rank 0 adds n3"]


def test_a_slow_link_of_a_node_is_every_rank_of_it(tmp_path: Path) -> None:
    done: list[int] = []
    fault = Fault(step=1, kind="slow_link", phase="optimizer", node="n0")
    for rank, node in ((0, "n0"), (1, "n0"), (2, "n1"), (1, "n0")):
        acts = {"slow_link": lambda _, rank=rank: done.append(rank)}
        FaultInjector(
            [fault], directory=tmp_path, rank=rank, node=node, leads_node=rank == 0, seated=("n0", "n1"), acts=acts
        ).at(1, "optimizer")
    assert done == [0, 1]
