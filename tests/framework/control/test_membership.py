"""Who may be used: machines that join, flap, leave and come back, on a clock that the test turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from framework.cluster.nodes import Node
from framework.control.membership import Membership, News

THREE = tuple(Node(f"n{i}", f"life{i}", f"10.0.0.{i}", alive=True) for i in range(3))


def members(**options: float) -> Membership:
    made = Membership(**({"bar_s": 60.0, "settle_s": 3.0} | options))  # type: ignore[arg-type]
    assert made.see(THREE, 0.0, answers=lambda _: True) == [], "what is there from the start is no news"
    return made


def see(made: Membership, nodes: tuple[Node, ...], now: float, answering: bool = True) -> list[str]:
    return [f"{item.what} {item.node}" for item in made.see(nodes, now, answers=lambda _: answering)]


def without(name: str) -> tuple[Node, ...]:
    return tuple(replace(node, alive=node.name != name) for node in THREE)


def reborn(name: str, life: str) -> tuple[Node, ...]:
    return tuple(replace(node, ray_id=life) if node.name == name else node for node in THREE)


def names(made: Membership, nodes: tuple[Node, ...], now: float) -> list[str]:
    return [node.name for node in made.usable(nodes, now)]


def test_a_machine_that_joins_is_usable_at_once_and_grown_onto_when_it_has_stayed() -> None:
    made, four = members(), (*THREE, Node("n3", "life3", "10.0.0.3", alive=True))
    assert see(made, four, 10.0) == ["joined n3"] and see(made, four, 10.1) == []
    assert names(made, four, 10.1) == ["n0", "n1", "n2", "n3"]
    assert made.settled(four, 12.9) == ("n0", "n1", "n2") and "n3" in made.settled(four, 13.0)


def test_a_machine_that_is_lost_and_comes_back_settles_anew() -> None:
    made = members()
    assert see(made, without("n1"), 10.0) == ["gone n1"] and names(made, without("n1"), 10.0) == ["n0", "n2"]
    assert see(made, reborn("n1", "second"), 20.0) == ["joined n1"]
    assert "n1" in names(made, reborn("n1", "second"), 20.0)
    assert "n1" not in made.settled(reborn("n1", "second"), 22.0) and "n1" in made.settled(reborn("n1", "second"), 23.0)


def test_a_machine_that_rebooted_between_two_looks_was_gone_too() -> None:
    assert see(members(), reborn("n1", "second"), 10.0) == ["gone n1", "joined n1"]


@pytest.mark.parametrize("unlisted_between", [False, True])
def test_a_machine_that_is_started_again_at_once_was_lost_once(unlisted_between: bool) -> None:
    """A machine was killed and started again within two seconds. It answered while Ray still listed its former life, so it was
    back; when Ray then listed the new life, it was taken for lost a second time, and barred after the second loss for a third.
    """
    made = members()
    for number, began in enumerate((10.0, 40.0)):
        old, new = ("life1" if not number else f"born{number}"), f"born{number + 1}"
        assert [item.what for item in made.lost("n1", began)] == ["gone"]
        assert see(made, reborn("n1", old), began + 2) == ["joined n1"], "it answers"
        news = see(made, without("n1"), began + 3) if unlisted_between else []
        news += see(made, reborn("n1", new), began + 4)
        assert news == (["gone n1", "joined n1"] if unlisted_between else [])
        assert "n1" in names(made, reborn("n1", new), began + 5), "two losses are not three"
        assert "n1" not in made.settled(reborn("n1", new), began + 6) and "n1" in made.settled(reborn("n1", new), began + 7)
    assert [item.what for item in made.lost("n1", 70.0)] == ["gone", "quarantine"], "the third"


def test_a_partitioned_machine_is_out_although_it_is_listed_and_back_when_it_answers() -> None:
    made = members()
    assert [item.what for item in made.lost("n1", 10.0)] == ["gone"]
    assert see(made, THREE, 10.1, answering=False) == [] and names(made, THREE, 10.1) == ["n0", "n2"]
    assert see(made, without("n1"), 16.0) == [], "the inventory finds out later: the same loss"
    assert see(made, reborn("n1", "second"), 20.0) == ["joined n1"]


def test_a_machine_that_comes_and_goes_is_barred_with_a_reason_and_an_expiry_and_free_again_after_it() -> None:
    made = members()
    for count in range(1, 4):
        now = 10.0 * count
        news = made.see(without("n1"), now, answers=lambda _: True)
        assert [item.what for item in news] == (["gone"] if count < 3 else ["gone", "quarantine"])
        see(made, reborn("n1", f"life {count}"), now + 5)
    assert news[-1] == News("quarantine", "n1", "n1 was lost 3 times in 600 s; not used for 60 s", 90.0)
    back = reborn("n1", "life 3")
    assert names(made, back, 40.0) == ["n0", "n2"] and names(made, back, 90.5) == ["n0", "n1", "n2"]
    assert see(made, back, 90.5) == ["expired n1"] and see(made, back, 90.6) == []


def test_a_second_quarantine_is_twice_as_long() -> None:
    made = members()
    assert made.evict("n1", "slow", 0.0).until == 60.0
    assert made.evict("n1", "slow", 100.0).until == 220.0


def test_losses_that_lie_far_apart_are_no_flapping() -> None:
    made = members()
    found = [made.lost("n1", 1000.0 * count) + made.see(THREE, 1000.0 * count + 1, answers=lambda _: True) for count in range(5)]
    assert {item.what for news in found for item in news} == {"gone", "joined"}


def test_a_machine_that_was_asked_to_leave_gets_no_work_until_it_comes_back_as_a_new_one() -> None:
    made = members()
    made.leave("n2", "life2", 10.0)
    see(made, THREE, 11.0)
    assert names(made, THREE, 11.0) == ["n0", "n1"] and made.leaving == {"n2"}
    see(made, without("n2"), 20.0)
    see(made, reborn("n2", "second"), 30.0)
    assert names(made, reborn("n2", "second"), 30.0) == ["n0", "n1", "n2"] and not made.leaving


def test_a_machine_that_goes_after_notice_is_not_flapping() -> None:
    made = members()
    for count in range(1, 5):
        draining = tuple(replace(node, draining=node.name == "n1") for node in reborn("n1", f"life {count}"))
        see(made, draining, 10.0 * count)
        assert see(made, without("n1"), 10.0 * count + 1) == ["gone n1"]


def test_a_controller_that_is_started_again_knows_who_is_barred() -> None:
    event = {"time": 100.0, "cause": "quarantine", "node": "n1", "reason": "n1 was lost 3 times"}
    made = members()
    made.recall([event, {"time": 101.0, "cause": "joined", "node": "n1"}], 120.0)
    assert names(made, THREE, 120.0) == ["n0", "n2"]
    assert see(made, THREE, 161.0) == ["expired n1"]


def test_the_head_and_draining_machines_get_no_work() -> None:
    made = members()
    nodes = (replace(THREE[0], head=True), replace(THREE[1], draining=True), THREE[2])
    assert names(made, nodes, 5.0) == ["n2"]


def test_a_quarantine_of_no_length_is_refused_only_if_negative() -> None:
    assert members(bar_s=0.0).evict("n1", "slow", 5.0) == News("quarantine", "n1", "slow; not used until a person lifts it", None)
    with pytest.raises(ValueError, match="base_s must not be negative"):
        members(bar_s=-1.0).evict("n1", "slow", 5.0)


def test_machines_that_do_not_answer_are_asked_one_at_a_time_and_not_in_every_look() -> None:
    """A connection to a machine behind a cut link takes a second to fail: four of them in every look, and the living ranks
    seemed not to answer either.
    """
    made, asked = members(), list[str]()
    for name in ("n0", "n1", "n2"):
        made.lost(name, 10.0)
    for tenth in range(31):
        made.see(THREE, 10.0 + tenth / 10, answers=lambda name: bool(asked.append(name)))
    assert 3 <= len(asked) <= 9 and set(asked) == {"n0", "n1", "n2"}
