"""The end of a run: what is saved, who reads it once more, what the last word says, and what interrupts it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from framework.cluster.cluster import RemoteError
from framework.control.closing import Closing
from framework.control.incident import Trouble
from framework.plan import Plan, Refused, Seat, Source
from parallel.layout import Layout

PLAN = Plan(
    run="r",
    generation=3,
    layout=Layout(dp=2),
    schedule="1f1b",
    num_microbatches=1,
    seats=(Seat("n0", 0), Seat("n1", 0)),
    domains={"n0": "n0", "n1": "n1"},
    tolerate=1,
    source=Source("memory", 6),
    options=(),
    reason="",
)


class Reader:
    """A worker that reads the state, or cannot."""

    def __init__(self, answer: dict[str, Any] | None) -> None:
        self.answer = answer

    def call(self, method: str, *_: object) -> Reader:
        assert method == "close_out"
        return self

    def result(self, _: float) -> dict[str, Any]:
        if self.answer is None:
            raise RemoteError(actor="worker:n0.0", node="n0", kind="RestoreError", message="no", traceback="")
        return self.answer


class World:
    """What a run's end meets. `saved` are the steps that were saved, `said` what was written down."""

    def __init__(
        self,
        *,
        reached: int = 8,
        snapshot: int | None = 8,
        missing: Sequence[str] = (),
        readers: Sequence[Reader] = (),
        dead: Sequence[str] = (),
        lost: Sequence[str] = (),
        kept: int | None = None,
        stuck: str = "",
        failure: str = "",
    ) -> None:
        self.saved: list[int] = [] if kept is None else [kept]
        self.said: list[str] = []
        found = None if snapshot is None else SimpleNamespace(step=snapshot, generation=3, missing=tuple(missing), to_json=dict)
        readers = readers or (Reader({"state_sha256": "a"}), Reader({"state_sha256": "b"}))
        wish = SimpleNamespace(at_end=True, on_signal=False)
        journal = SimpleNamespace(plan=PLAN, reached=reached, event=lambda kind, reason, cause: self.said.append(reason))
        self.closing = Closing(
            SimpleNamespace(fault_tolerance=SimpleNamespace(durable=wish)),  # type: ignore[arg-type]
            cluster=SimpleNamespace(confirm=lambda node: node not in dead),  # type: ignore[arg-type]
            journal=journal,  # type: ignore[arg-type]
            memory=SimpleNamespace(look=lambda agents: None, snapshot=found, lost=frozenset(lost)),  # type: ignore[arg-type]
            durable=SimpleNamespace(finish=lambda: stuck, failure=failure, begin=self.save, newest=self.newest),  # type: ignore[arg-type]
            pool=SimpleNamespace(agents={}, workers=dict(zip(("n0.0", "n1.0"), readers, strict=True))),  # type: ignore[arg-type]
            specs=(),
            keep=lambda plan: None,
        )

    def save(self, plan: Plan, step: int, agents: object, specs: object) -> None:
        self.saved.append(step)

    def newest(self) -> Source | None:
        return Source("durable", max(self.saved), f"run/step_{max(self.saved)}") if self.saved else None


def test_the_last_state_is_saved_as_wished_and_read_by_whoever_can() -> None:
    world = World(readers=(Reader(None), Reader({"state_sha256": "b"})))
    assert world.closing.close_out("finished") == {"state_sha256": "b"}
    assert world.saved == [8]
    assert World().closing.close_out("interrupted") == {"state_sha256": "a"}
    nobody = World(readers=(Reader(None), Reader(None)))
    assert nobody.closing.close_out("finished") == {}
    assert "could not be read" in nobody.said[0]


def test_a_last_state_that_was_not_saved_is_said_to_be_lost() -> None:
    """A run whose storage was dead at its end said that it had finished, and exited with 0."""
    failed = World(failure="OSError: no space left").closing.close_out("finished")
    assert failed == {"state_sha256": "a", "unsaved": "the last state, of step 8, was not saved: OSError: no space left"}
    world = World(stuck="a save to s3://runs was not waited for")
    ended = world.closing.close_out("finished")
    assert isinstance(ended, dict) and ended["unsaved"].endswith("a save to s3://runs was not waited for")
    assert world.saved == [], "one save at a time"
    assert World(stuck="a save").closing.close_out("interrupted") == {"state_sha256": "a"}, "it was not wished for"


def test_a_state_that_is_not_the_last_one_is_not_passed_off_as_it() -> None:
    world = World(reached=9)
    assert world.closing.close_out("finished") == {}
    assert world.saved == []


def test_a_machine_that_is_lost_while_the_state_is_saved_is_trouble_and_not_the_end() -> None:
    """A node died between the last step and the checkpoint: the run was called finished, without checkpoint and digest."""
    lost = World(dead=("n1",)).closing.close_out("finished")
    assert isinstance(lost, Trouble)
    assert (lost.kind, lost.ranks, lost.nodes, lost.planned) == ("node_loss", (1,), ("n1",), False)
    vault = World(lost=("n0",)).closing.close_out("finished")
    assert isinstance(vault, Trouble)
    assert (vault.kind, vault.nodes) == ("crash", ("n0",))


def test_the_last_word_says_what_exists_and_how_to_go_on() -> None:
    error = Refused("state lost: step 8 was reached")
    nothing = World(snapshot=None).closing.last_word(error)
    assert nothing.startswith("state lost: step 8 was reached; no checkpoint exists: start again, with fault_tolerance.tolerate raised")
    assert World(snapshot=None, kept=4).closing.last_word(error).endswith("a checkpoint of step 4 exists: go on with resume=run/step_4")


def test_a_run_that_cannot_go_on_saves_what_is_whole_and_newer_than_what_is_saved() -> None:
    assert World(kept=4).closing.last_word(Refused("")).endswith("a checkpoint of step 8 exists: go on with resume=run/step_8")
    assert "no checkpoint exists" in World(missing=("n1",)).closing.last_word(Refused(""))
    world = World(kept=8)
    world.closing.last_word(Refused(""))
    assert world.saved == [8]
