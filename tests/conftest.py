"""The suite's own rules: quick tests first, what starts a Ray cluster or takes long is marked, and who may run beside whom.

    pytest                                    one after the other
    pytest -m "not slow and not cluster"      what `make test-fast` runs, after every edit
    pytest -n 2 --dist loadscope ...          what `make test` runs: two lanes

Tests with a Ray cluster wait most of the time, and what they wait for has deadlines: one lane takes their files, one after the
other. The other lane computes meanwhile, and gives way: at a lower priority it takes what the clusters leave of the processors.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import xdist
from xdist.scheduler import LoadScopeScheduling

QUICK = "not slow and not cluster"  # what is asked for after every edit
WHOLLY = re.compile(r"^pytestmark = .*pytest\.mark\.(slow|cluster)\b", re.MULTILINE)
CLUSTERS = "clusters"  # the scope in which nothing runs beside anything
GIVES_WAY = 10  # of `nice`: a tenth of the weight of a process of the other lane

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # who starts the tests in the background must not decide what they see
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Lanes(LoadScopeScheduling):  # type: ignore[misc]
    """Gives out all files with clusters as one piece of work, and of the other files one function after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return CLUSTERS if _has_clusters(self.config.rootpath / nodeid.partition("::")[0]) else nodeid.partition("[")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes | None:
    """Lanes where scopes are asked for; otherwise what xdist has."""
    return Lanes(config, log) if config.option.dist == "loadscope" else None


def pytest_configure_node(node: Any) -> None:
    """A process that runs tests is told whether there are lanes."""
    node.workerinput["lanes"] = node.config.option.dist == "loadscope"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Properties are tried on a hundred examples, in quick tests on twenty: both draw others every time."""
    if not xdist.is_xdist_controller(session):
        from hypothesis import settings  # here: whoever only gives out tests need not wait for it

        settings.register_profile("whole", deadline=None)
        settings.register_profile("quick", deadline=None, max_examples=20)
        settings.load_profile("quick" if _is_quick(session.config) else "whole")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file of which no test is quick is not even imported: it brings in libraries that nothing else needs."""
    if _is_quick(config) and collection_path.suffix == ".py" and WHOLLY.search(collection_path.read_text()):
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Any:
    """What is imported stays to the end: nobody looks through it for garbage, now or later."""
    gc.disable()
    result = yield
    gc.enable()
    gc.freeze()
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order by cost, stable otherwise, so that a mistake shows in seconds. In lanes the clusters begin, beside the quick tests."""
    items.sort(key=lambda item: 2 * _marked(item, "cluster") + _marked(item, "slow"))
    if _in_lanes(config):
        items.sort(key=lambda item: not _has_clusters(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Whoever computes gives way from its first test on: all clusters are given out by then."""
    if _in_lanes(item.config) and not _has_clusters(item.path):
        _give_way()


def _is_quick(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == QUICK)


def _marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


@functools.cache
def _has_clusters(file: Path) -> bool:
    return "pytest.mark.cluster" in file.read_text()


def _in_lanes(config: pytest.Config) -> bool:
    return bool(getattr(config, "workerinput", {}).get("lanes"))


@functools.cache
def _give_way() -> None:
    os.nice(GIVES_WAY)
