"""Failures of one step: whom they blame, and when it is enough."""

from __future__ import annotations

from framework.trouble.failures import BLAMED, MAX_FAILURES, Failures


def test_a_machine_that_is_alone_in_all_of_them_is_the_culprit_before_it_is_too_late() -> None:
    failures = Failures()
    failures.add(7, ["n2"])
    assert failures.culprit(7) is None
    failures.add(7, ["n2"])
    assert failures.culprit(7) == "n2"
    assert failures.times(7) == BLAMED < MAX_FAILURES


def test_nobody_is_blamed_for_what_happens_in_several_places_or_nowhere() -> None:
    for places in ([["n2"], ["n1"]], [["n2"], ["n1", "n2"]], [["n2"], []], [[], []]):
        failures = Failures()
        for nodes in places:
            failures.add(7, nodes)
        assert failures.culprit(7) is None, places


def test_every_step_is_counted_by_itself() -> None:
    failures = Failures()
    failures.add(7, ["n2"])
    failures.add(8, ["n2"])
    assert failures.culprit(7) is None and failures.culprit(8) is None and failures.times(8) == 1


def test_who_is_to_blame_now_counts_not_who_was_before() -> None:
    """One crash elsewhere must not hide a machine that fails from then on."""
    failures = Failures()
    for node in ("n1", "n2", "n2"):
        failures.add(7, [node])
    assert failures.culprit(7) == "n2"
