"""Real ranks that misbehave, watched from outside; hosts are network namespaces one of whose ways is slow."""

from __future__ import annotations

import pytest

from benchmarks.detection import Injection, run
from benchmarks.hosts import why_not
from parallel.layout import Layout
from parallel.native import BuildError
from parallel.recorder_build import load

NO_HOSTS = why_not()


@pytest.fixture(autouse=True, scope="module")
def extension():
    try:
        load()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "injection"),
    [
        ("1x4x1", Injection("killed", 2, 14)),
        ("2x2x1", Injection("sigstop", 1, 14)),
        ("2x2x1", Injection("gil", 3, 14)),
        ("2x2x1", Injection("skipped", 0, 14)),
        ("2x2x1", Injection("straggler", 2, 14, 2.0)),
        ("2x2x1", Injection("none")),
    ],
)
def test_who_misbehaves_is_named_soon(layout, injection):
    outcome = run(Layout.parse(layout), injection, seed=1)
    assert outcome.right, outcome
    limits = {"killed": 2.0, "sigstop": 5.0, "gil": 15.0, "skipped": 15.0}
    assert outcome.seconds < limits.get(injection.kind, 60.0)


@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_a_link_limited_by_the_switch_is_named():
    outcome = run(Layout.parse("1x4x1"), Injection("slow_link", 1, 14, 5.0, 2), seed=2)
    assert outcome.right, outcome
