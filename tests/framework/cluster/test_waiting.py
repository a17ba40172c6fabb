"""Waiting for nodes: what is missing is said at once and when it changes, and a run that is ended does not wait on."""

import time

import pytest

from framework.cluster.nodes import ClusterError
from framework.cluster.waiting import await_nodes


class Growing:
    """A cluster that gets one node more with every question."""

    def __init__(self, *there):
        self.there = list(there)

    def require(self, *, num_nodes, timeout_s):
        present = self.there.pop(0) if len(self.there) > 1 else self.there[0]
        if present < num_nodes:
            time.sleep(min(timeout_s, 0.01))
            raise ClusterError(f"{num_nodes} needed, present {present}, missing {num_nodes - present} after {timeout_s:g} s")


def test_every_change_is_told_once():
    said = []
    assert await_nodes(Growing(1, 1, 2, 3), num_nodes=3, timeout_s=600, stopped=lambda: False, tell=said.append)
    assert [text.partition(": ")[2] for text in said] == ["3 needed, present 1, missing 2", "3 needed, present 2, missing 1"]


def test_it_gives_up_with_the_whole_time_in_its_words():
    with pytest.raises(ClusterError, match="missing 2 after 0.05 s"):
        await_nodes(Growing(1), num_nodes=3, timeout_s=0.05, stopped=lambda: False, tell=lambda text: None)


def test_a_run_that_is_ended_waits_no_longer():
    said = []
    assert not await_nodes(Growing(1), num_nodes=3, timeout_s=600, stopped=lambda: bool(said), tell=said.append)
