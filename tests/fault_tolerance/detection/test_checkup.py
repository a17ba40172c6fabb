"""Checkup and probe: the odd one out is named, and nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fault_tolerance.detection.checkup import Checkup, NodeReport, WayReport, best_of, slow_nodes
from fault_tolerance.detection.probe import Probe
from fault_tolerance.detection.reachability import Dead

USUAL = NodeReport(
    node="n0",
    host="10.0.0.1",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    interface="eth0",
    limits={"shm_bytes": 8 << 30, "cores": 16.0, "open_files": 65536.0},
    speeds={"copy_bytes_per_s": 1e10, "flops_per_s": 1e11},
)
NODES = tuple(replace(USUAL, node=f"n{i}") for i in range(4))
WAYS = {(a.node, b.node): WayReport(1e-4, 0.01, 1 << 20) for a in NODES for b in NODES if a is not b}


def found(changed: NodeReport, ways: dict[tuple[str, str], WayReport] | None = None) -> list[tuple[tuple[str, ...], bool]]:
    nodes = tuple(changed if report.node == changed.node else report for report in NODES)
    return [(finding.nodes, finding.must) for finding in Checkup(nodes, WAYS if ways is None else ways).findings]


def test_of_equal_nodes_nothing_is_said():
    assert found(NODES[2]) == []


@pytest.mark.parametrize(
    ("changes", "must"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.1"}}, True),
        ({"failure": "no answer"}, True),
        ({"speeds": {"copy_bytes_per_s": 1e10, "flops_per_s": 0.7e11}}, False),
        ({"speeds": {"copy_bytes_per_s": 0.5e10, "flops_per_s": 1e11}}, False),
        ({"limits": {"shm_bytes": 64 << 20, "cores": 16.0, "open_files": 65536.0}}, False),
        ({"limits": {"shm_bytes": 8 << 30, "cores": 4.0, "open_files": 65536.0}}, False),
        ({"limits": {"shm_bytes": 8 << 30, "cores": 16.0, "open_files": 256.0}}, False),
        ({"clock_offset_s": -2.5}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_one_node_that_differs_is_named(changes, must):
    named = found(replace(NODES[2], **changes))
    assert named and {nodes for nodes, _ in named} == {("n2",)} and named[0][1] is must


def test_a_clock_is_not_blamed_for_a_slow_question():
    assert found(replace(NODES[2], clock_offset_s=0.3, clock_error_s=0.2)) == []


def test_a_way_that_is_closed_is_wrong_and_one_that_is_slow_is_odd():
    assert found(NODES[0], WAYS | {("n1", "n3"): WayReport(0.0, 0.0, 1, "timed out")}) == [(("n1", "n3"), True)]
    failed = WAYS | {("n1", "n3"): WayReport(0.0, 0.0, 1, "timed out"), ("n3", "n1"): WayReport(0.0, 0.0, 1, "timed out")}
    [finding] = Checkup(NODES, failed, (Dead("n3", "n1", "nothing comes"),)).findings
    assert finding.must and finding.reason.startswith("way n3>n1: nothing comes; "), "both fail, one direction is dead"
    [(nodes, must)] = found(NODES[0], WAYS | {("n1", "n3"): WayReport(1e-4, 0.05, 1 << 20)})
    assert set(nodes) == {"n1", "n3"} and not must


def test_a_node_that_sends_slowly_to_all_is_named_alone():
    slow = {way: WayReport(1e-4, 0.05, 1 << 20) for way in WAYS if way[0] == "n2"}
    assert found(NODES[0], WAYS | slow) == [(("n2",), False)]


def test_a_busy_moment_is_forgiven_by_a_second_measurement():
    slow = replace(NODES[1], speeds={"copy_bytes_per_s": 1e10, "flops_per_s": 4e10})
    assert slow_nodes((NODES[0], slow, *NODES[2:])) == ("n1",)
    assert slow_nodes((NODES[0], best_of(slow, {"copy_bytes_per_s": 9e9, "flops_per_s": 1e11}), *NODES[2:])) == ()


def test_probes_measure_themselves_and_each_other():
    here, there = Probe(host="127.0.0.1"), Probe(host="127.0.0.1")
    try:
        latency, seconds = here.way(there.address(), num_bytes=1 << 20)
        assert 0 < latency < 1 and 0 < seconds < 10
        assert all(value > 0 for value in {**here.speeds(), **here.limits()}.values())
        assert here.versions()["torch"].startswith("2.13")
    finally:
        here.close()
        there.close()


def test_a_peer_that_is_gone_is_an_error_and_not_a_number():
    here, there = Probe(host="127.0.0.1"), Probe(host="127.0.0.1")
    address = there.address()
    there.close()
    with pytest.raises(OSError):
        here.way(address, num_bytes=1024)
    here.close()
