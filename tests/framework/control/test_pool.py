"""The pool against a cluster whose nodes die at the wrong moment. Real processes: `test_cluster.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from framework.cluster.nodes import CallError, ClusterError, Exit, WorkerDied
from framework.control.pool import STUCK_S, Pool, PoolError, overdue


class Empty:
    """A cluster of some machines, on which nothing runs yet."""

    names: tuple[str, ...]

    def nodes(self) -> list[Any]:
        return [SimpleNamespace(name=name, ip="127.0.0.1", alive=True) for name in self.names]

    def vaults(self) -> dict[str, Any]:
        return {}

    workers = vaults

    def call_context(self) -> dict[str, Any]:
        return {"version": "1", "digest": "d"}


class Dying(Empty):
    """n1 is listed as alive, and is not when something is started on it."""

    names = ("n0", "n1")

    def start_vault(self, node: str, *_: object, **__: object) -> Any:
        if node == "n1":
            raise ClusterError("node: must be alive, got n1; alive are n0")
        return SimpleNamespace(ready=lambda: "call")

    def start_worker(self, node: str, *_: object, **__: object) -> Any:
        return self.start_vault(node)


def test_a_node_that_dies_while_its_workers_are_started_is_the_pool_s_trouble() -> None:
    """A killed node came back, was listed, and was gone again: ClusterError went through the controller and ended the run."""
    pool = Pool(Dying(), logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n0.0", "n1.0"])
    assert set(pool.workers) == {"n0.0"}
    assert set(pool.agents) == {"n0"}
    with pytest.raises(PoolError, match=r"nodes of n1\.0 must be alive"):
        pool.ensure(["n0.0", "n1.0"], timeout_s=1.0)


@dataclass(frozen=True)
class Ready:
    """A call that has ended."""

    result: Callable[[float], dict[str, str]]
    ended: bool = True

    def done(self) -> bool:
        return self.ended


class Settling(Empty):
    """A cluster of n1, whose workers die while they are started until `well`; what is killed is in `killed`."""

    names = ("n1",)

    def __init__(self) -> None:
        self.well, self.answers, self.killed = False, True, list[str]()
        self.program = {"version": "1", "digest": "d", "code_path": "/here"}

    def start_vault(self, node: str, *_: object, **__: object) -> Any:
        return self._remote(f"agent {node}", well=True)

    def start_worker(self, node: str, seat: str, *_: object, **__: object) -> Any:
        return self._remote(f"worker {seat}", well=self.well)

    def _remote(self, name: str, *, well: bool) -> Any:
        def result(_: float) -> dict[str, str]:
            if not well:
                raise CallError("gone", actor=name, node="n1")
            return self.program

        ready = Ready(result, ended=self.answers)
        return SimpleNamespace(ready=lambda: ready, facts=dict, kill=lambda: self.killed.append(name))


def test_a_worker_that_died_before_it_was_of_use_is_not_ready_and_is_started_again() -> None:
    """A node came back, its worker died while the crew was still to grow onto it: it counted as ready, and the crew was ended
    for a node on which nobody could sit.
    """
    cluster = Settling()
    pool = Pool(cluster, logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n1.0"])
    assert not pool.is_ready(["n1.0"])
    assert "n1.0" not in pool.workers and "n1" in pool.agents
    cluster.well = True
    pool.start(["n1.0"])
    assert pool.is_ready(["n1.0"])


def test_a_machine_with_another_program_is_told_from_one_where_a_process_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine joined with an older installation: its worker counted as ready, the crew was ended for it, it failed the same way
    three times, and a healthy run was over.
    """
    monkeypatch.setattr("framework.control.pool.wait_any", lambda calls, timeout_s: (calls, []))
    monkeypatch.setattr("framework.control.pool.wait_all", lambda calls, timeout_s: (calls, []))
    cluster = Settling()
    cluster.well, cluster.program = True, cluster.program | {"digest": "older"}
    pool = Pool(cluster, logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n1.0"])
    assert not pool.is_ready(["n1.0"])
    [told] = pool.unready
    assert told.nodes == ("n1",) and "install the same holdfast on every node" in told.misfit
    with pytest.raises(PoolError, match="digest older against d") as raised:
        pool.ensure(["n1.0"], timeout_s=1.0)
    assert raised.value.misfit == str(raised.value) and raised.value.nodes == ("n1",)


def test_a_worker_of_a_joining_machine_that_never_comes_up_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine came back and one of its workers never answered, nor ended: the machine was not grown onto for the rest of the run."""
    cluster = Settling()
    cluster.well, cluster.answers = True, False
    pool = Pool(cluster, logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n1.0"])
    assert not pool.is_ready(["n1.0"]) and not cluster.killed
    monkeypatch.setattr("framework.control.pool.LATE_S", 0.0)
    assert not pool.is_ready(["n1.0"]) and sorted(cluster.killed) == ["agent n1", "worker n1.0"]
    assert len(pool.unready) == 2
    cluster.answers = True
    pool.start(["n1.0"])
    assert pool.is_ready(["n1.0"])


def test_what_is_on_a_lost_node_is_ended_should_it_be_there_again() -> None:
    """A node that was cut off came back with the workers of its former life, which held the seats of the new ones."""
    cluster = Settling()
    pool = Pool(cluster, logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n1.0"])
    pool.forget(node="n1")
    assert sorted(cluster.killed) == ["agent n1", "worker n1.0"] and not pool.workers and not pool.agents


def test_who_stays_away_is_judged_by_how_long_others_took() -> None:
    late = ["worker n1.0"]
    assert overdue(late, {"worker n0.0": 1.2}, STUCK_S + 1, 120.0) == {"worker n1.0"}
    assert not overdue(late, {"worker n0.0": 1.2}, STUCK_S - 1, 120.0), "too soon to say"
    assert not overdue(late, {"worker n0.0": 14.0}, 55.0, 120.0), "all are slow on this machine"
    assert overdue(late, {"worker n0.0": 14.0}, 57.0, 120.0)
    assert not overdue(late, {"agent n0": 2.0, "agent n1": 3.0}, 50.0, 120.0), "agents are light, and no measure for workers"
    assert not overdue(late, {}, 50.0, 120.0), "nobody has come up yet, which may be the machine's first imports"
    assert not overdue(late, {"worker n0.0": 1.2}, 61.0, 120.0), "started anew, it would hardly be in time"


class Revived(Empty):
    """A cluster of n0, which died and is back at once: what was started on it before is said to be gone only now."""

    names = ("n0",)

    def __init__(self) -> None:
        self.lives = dict.fromkeys(("agent n0", "worker n0.0", "worker n0.1"), 0)

    def start_vault(self, node: str, *_: object, **__: object) -> Any:
        return Starting(self, f"agent {node}")

    def start_worker(self, node: str, seat: str, *_: object, **__: object) -> Any:
        return Starting(self, f"worker {seat}")


class Starting:
    """A process, and the call that answers when it is up."""

    def __init__(self, cluster: Revived, name: str) -> None:
        cluster.lives[name] += 1
        self.name, self.life = name, cluster.lives[name]

    def ready(self) -> Starting:
        return self

    def result(self, timeout_s: float) -> dict[str, str]:
        if self.life == 1:
            raise WorkerDied(actor=self.name, node="n0", exit=Exit.NODE, cause="node n0 died")
        return {"version": "1", "digest": "d"}

    def call(self, *_: object) -> Any:
        return SimpleNamespace(wait=lambda timeout_s: True)

    def kill(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {}


def test_what_was_started_in_a_former_life_of_a_machine_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine was killed and came back within a second. Its agent and both workers of the life before were found dead one after the
    other, as three failures of one step, and the run ended for want of progress.
    """
    monkeypatch.setattr("framework.control.pool.wait_any", lambda calls, timeout_s: (calls, []))
    monkeypatch.setattr("framework.control.pool.wait_all", lambda calls, timeout_s: (calls, []))
    cluster = Revived()
    pool = Pool(cluster, logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    took = pool.ensure(["n0.0", "n0.1"], timeout_s=5.0)
    assert took.keys() == cluster.lives.keys() and set(cluster.lives.values()) == {2}
