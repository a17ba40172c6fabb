"""Real ranks that misbehave, watched from outside; hosts are network namespaces whose ways are made slow or cut."""

from __future__ import annotations

import time

import pytest

from benchmarks.detection import Injection, run
from benchmarks.drilled import crew
from benchmarks.hosts import Hosts, why_not
from fault_tolerance.detector import Detector
from fault_tolerance.tcp import Connection, connections
from fault_tolerance.verdict import Kind, Topology, Verdict
from fault_tolerance.ways import locate, used_and_stuck
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


def _first_verdict(layout: Layout, hosts: Hosts, breaks) -> Verdict:
    topology = Topology.one_node_each(layout)
    detector, broken, end = Detector(topology), False, time.monotonic() + 90
    with crew(layout, Injection("none"), steps=500, seed=3, hosts=hosts) as started:
        while time.monotonic() < end:
            time.sleep(0.2)
            found = detector.observe(started.observed())
            if not broken and detector.step >= 8:
                breaks()
                broken = True
            if broken and found:
                tables = {rank: connections(process.pid) for rank, process in enumerate(started.processes)}
                return locate(found[0], tables, topology)
    raise TimeoutError("no verdict")


@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_a_host_that_is_cut_off_is_named():
    with Hosts(4) as hosts:
        found = _first_verdict(Layout.parse("2x2x1"), hosts, lambda: hosts.cut(2))
    assert (found.kind, found.ranks, found.nodes) == (Kind.NODE_LOSS, (2,), ("node2",)), found


@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_a_direction_that_is_dropped_names_its_way():
    with Hosts(4) as hosts:
        found = _first_verdict(Layout.parse("2x2x1"), hosts, lambda: hosts.drop_way(3, 1))
    assert found.kind == Kind.LINK_HANG and set(found.link or ()) == {1, 3}, found


A, B, C = ("10.0.0.1", 1), ("10.0.0.2", 2), ("10.0.0.3", 3)
THREE = Topology.one_node_each(Layout.parse("1x3x1"))
HANG = Verdict(Kind.LINK_HANG, (0, 1, 2), ("node0", "node1", "node2"), "it does not end")


def _tables(*stuck: tuple[int, int]) -> dict[int, list[Connection]]:
    ends = {(0, 1): (A, B), (0, 2): (("10.0.0.1", 7), C), (1, 2): (("10.0.0.2", 8), ("10.0.0.3", 9))}
    tables: dict[int, list[Connection]] = {0: [], 1: [], 2: []}
    for (a, b), (x, y) in ends.items():
        tables[a].append(Connection(x, y, 100, 5 if (a, b) in stuck else 0))
        tables[b].append(Connection(y, x, 100, 5 if (b, a) in stuck else 0))
    tables[0].append(Connection(A, ("10.0.0.99", 80), 10, 9))
    return tables


def test_connections_to_strangers_are_no_ways():
    used, stuck = used_and_stuck(_tables((0, 1)))
    assert len(used) == 6 and stuck == {(0, 1)}


def test_one_stuck_way_is_a_link_and_all_of_a_machine_are_the_machine():
    assert locate(HANG, _tables(), THREE) == HANG
    assert locate(HANG, _tables((2, 0), (0, 2)), THREE).link == (0, 2)
    cut = locate(HANG, _tables((0, 1), (2, 1), (1, 2)), THREE)
    assert (cut.kind, cut.ranks) == (Kind.NODE_LOSS, (1,))


def test_a_process_s_connections_are_read_from_outside():
    import os
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            mine = {(c.local, c.remote) for c in connections(os.getpid())}
            assert (client.getsockname(), client.getpeername()) in mine
            assert (client.getpeername(), client.getsockname()) in mine
    assert connections(2**22 + 1) == []
