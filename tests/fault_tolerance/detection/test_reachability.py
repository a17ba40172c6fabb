"""Dead ways out of what machines see of each other: drawn matrices, every set of lost directions, and real sockets."""

from __future__ import annotations

import multiprocessing as mp
from itertools import combinations, permutations
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.hosts import Hosts, why_not
from fault_tolerance.detection.probe import Probe
from fault_tolerance.detection.reachability import Dead, Stage, Way, as_verdict, dead_ways, judge_reach, leave_out
from fault_tolerance.detection.verdict import Kind, Topology
from parallel.layout import Layout
from tests.fault_tolerance.detection import lossy

NO_HOSTS = why_not()
NODES = ("n0", "n1", "n2", "n3", "n4")
PAIRS = list(permutations(NODES, 2))


def _lost(drawing: str) -> set[tuple[str, str]]:
    """The cells marked x of a matrix: rows send, columns receive."""
    rows = [line.split() for line in drawing.strip().splitlines()]
    return {(NODES[a], NODES[b]) for a, row in enumerate(rows) for b, mark in enumerate(row) if mark == "x"}


def _dead(*ways: tuple[str, str]) -> list[Dead]:
    return [Dead(a, b, "nothing comes") for a, b in ways]


@given(st.sets(st.sampled_from(PAIRS)))
def test_whatever_directions_are_lost_these_are_named_and_no_others(lost: set[tuple[str, str]]) -> None:
    assert {d.ends for d in dead_ways(lossy.seen(NODES, lost))} == lost


@pytest.mark.parametrize(
    ("drawing", "named"),
    [
        (". o o o\no . o x\no o . o\no o o .", ["way n1>n3"]),
        (". o o o\no . o x\no o . o\no x o .", ["way n1>n3", "way n3>n1"]),
        (". o o o\nx . x x\no o . o\no o o .", ["row n1"]),
        (". x o o\no . o o\no x . o\no x o .", ["column n1"]),
        (". x o o\nx . x x\no x . o\no x o .", ["node n1"]),
        (". o o o\nx . x x\no o . o\nx o o .", ["row n1", "way n3>n0"]),
        (". o o o\no . o o\no o . o\no o o .", []),
    ],
    ids=["cell", "both directions", "row", "column", "node", "row and cell", "nothing"],
)
def test_a_drawn_matrix_names_its_cell_row_column_or_node(drawing: str, named: list[str]) -> None:
    seen = lossy.seen(NODES[:4], _lost(drawing))
    told = judge_reach(dead_ways(seen), seen)
    assert [text.partition(":")[0] for text in told] == named, told


def test_a_network_that_lets_no_datagram_through_has_no_dead_way() -> None:
    seen = {pair: Way(Stage.DONE, 0.001, "", 8, 0) for pair in PAIRS}
    assert dead_ways(seen) == ()


def test_without_datagrams_a_dead_pair_is_dead_in_both_directions() -> None:
    """Then nobody can tell which direction it is, and nobody says so."""
    seen = lossy.seen(NODES, {("n1", "n3")}) | {pair: Way(Stage.CONNECT, 2.5, "timed out", 8, 0) for pair in (("n1", "n3"), ("n3", "n1"))}
    assert {d.ends for d in dead_ways(seen)} == {("n1", "n3"), ("n3", "n1")}


def test_a_filter_of_tcp_alone_is_a_pair_of_dead_ways_over_which_datagrams_come() -> None:
    seen = lossy.seen(NODES, ()) | {pair: Way(Stage.CONNECT, 2.5, "timed out", 8, 8) for pair in (("n1", "n3"), ("n3", "n1"))}
    found = dead_ways(seen)
    assert {d.ends for d in found} == {("n1", "n3"), ("n3", "n1")} and all("8 of 8 small datagrams came" in d.why for d in found)


def test_large_packets_that_are_lost_are_the_way_of_the_answer() -> None:
    """Connections open, small things pass: a path that drops what exceeds its packet size."""
    [found] = dead_ways(lossy.seen(NODES, ()) | {("n1", "n3"): Way(Stage.DATA, 2.5, "timed out", 8, 8)})
    assert found.ends == ("n3", "n1")


def test_a_machine_too_busy_to_answer_has_no_dead_way() -> None:
    busy = {(a, "n3"): Way(Stage.ANSWER, 5.0, "timed out", 8, 0) for a in NODES if a != "n3"}
    assert dead_ways(lossy.seen(NODES, ()) | busy) == ()


def test_a_machine_that_lets_no_connection_in_from_one_other_is_the_way_to_it() -> None:
    [found] = dead_ways(lossy.seen(NODES, ()) | {("n1", "n3"): Way(Stage.CONNECT, 0.0, "Connection refused", 8, 8)})
    assert found.ends == ("n1", "n3") and "refused" in found.why


def test_a_machine_that_could_not_be_asked_is_not_judged() -> None:
    seen = lossy.seen(NODES, {("n1", "n3")})
    assert dead_ways({pair: way for pair, way in seen.items() if pair[0] != "n3"}) == ()


def test_a_verdict_has_the_cell_as_its_link_and_says_what_was_seen() -> None:
    seen, topology = lossy.seen(NODES[:4], {("n1", "n3")}), Topology(Layout(1, 8, 1), ("n0", "n0", "n1", "n1", "n2", "n2", "n3", "n3"))
    verdict = as_verdict(dead_ways(seen), seen, topology, before="it does not end")
    assert (verdict.kind, verdict.link, verdict.nodes) == (Kind.LINK_HANG, (2, 6), ("n1", "n3"))
    assert verdict.reason.startswith("way n1>n3: ") and verdict.reason.endswith("it does not end")
    assert "0 of 8 small datagrams came from n1 to n3" in verdict.reason and verdict.evidence[-1] == "11 other ways are alive"


def test_of_one_dead_way_the_end_without_rank_0_is_left_out_and_a_spare_before_one_that_trains() -> None:
    assert leave_out(_dead(("n0", "n2")), NODES[:3], seated=NODES[:3]).nodes == ("n2",)
    assert leave_out(_dead(("n2", "n0")), NODES[:3], seated=NODES[:3]).nodes == ("n2",)
    assert leave_out(_dead(("n1", "n2")), NODES[:3], seated=("n0", "n2")).nodes == ("n1",)
    out = leave_out(_dead(("n1", "n2")), NODES[:4], seated=NODES[:4])
    assert out.reason == "way n1>n2: dead; n2 left out, the fewest machines that cover it (3 of 4 stay)"


def test_the_other_end_is_used_again_when_the_one_is_gone() -> None:
    assert leave_out(_dead(("n1", "n2")), ("n0", "n2", "n3")).nodes == ()


def test_a_machine_whose_row_is_dead_goes_alone() -> None:
    row = _dead(*((a, b) for a, b in PAIRS if a == "n0"))
    assert leave_out(row, NODES, seated=NODES).nodes == ("n0",)


@given(st.sets(st.sampled_from(PAIRS), max_size=8))
def test_what_is_left_out_covers_every_dead_way_and_nothing_smaller_does(ways: set[tuple[str, str]]) -> None:
    out = leave_out(_dead(*ways), NODES, seated=NODES).nodes
    assert all(set(way) & set(out) for way in ways)
    assert not any(all(set(way) & set(c) for way in ways) for size in range(len(out)) for c in combinations(NODES, size))


def test_among_many_machines_every_dead_way_is_covered() -> None:
    many = [f"n{i}" for i in range(60)]
    ways = [(f"n{i}", f"n{(7 * i + 1) % 60}") for i in range(40) if i != (7 * i + 1) % 60]
    out = leave_out(_dead(*ways, *(("n5", f"n{i}") for i in range(6, 50))), many).nodes
    assert "n5" in out and all(set(way) & set(out) for way in ways) and len(out) <= 30


@pytest.mark.slow
def test_two_probes_reach_each_other_and_count_what_came() -> None:
    one, other = Probe(host="127.0.0.1"), Probe(host="127.0.0.1")
    try:
        asked, sent_to = other.ends("round-1")
        assert one.reach({"other": asked})["other"][0] == Stage.DONE
        sent = one.send({"other": sent_to}, token="round-1", name="one")
        one.send({"other": sent_to}, token="stranger", name="one")
        assert other.heard("round-1") == {"one": sent} and other.heard("stranger") == {}
    finally:
        one.close()
        other.close()
    assert one.reach({"other": asked})["other"][0] == Stage.CONNECT


def _on_host(hosts: Hosts, number: int, pipe: Connection) -> None:
    hosts.enter(number)
    probe = Probe(host=hosts.address(number))
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(probe, call[0])(*call[1:-1], **call[-1]))


def _asked(pipes: dict[str, Any], calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    for name, call in calls.items():
        pipes[name].send(call)
    return {name: pipes[name].recv() for name in calls}


@pytest.mark.slow
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_directions_that_are_dropped_between_hosts_are_named() -> None:
    """Real networks: the right cell, then a row, then a machine that is cut off."""
    with Hosts(3) as hosts:
        pipes, processes, context = {}, [], mp.get_context("fork")
        for number in range(3):
            pipes[f"n{number}"], theirs = context.Pipe()
            processes.append(context.Process(target=_on_host, args=(hosts, number, theirs), daemon=True))
            processes[-1].start()

        def named(token: str) -> tuple[str, ...]:
            ends = _asked(pipes, {n: ("ends", token, {}) for n in pipes})
            sent = _asked(pipes, {n: ("send", {p: ends[p][1] for p in pipes if p != n}, {"token": token, "name": n}) for n in pipes})
            told = _asked(pipes, {n: ("reach", {p: ends[p][0] for p in pipes if p != n}, {}) for n in pipes})
            heard = _asked(pipes, {n: ("heard", token, {}) for n in pipes})
            seen = {(a, b): Way(Stage(s), t, f, sent[a], heard[b].get(a, 0)) for a in told for b, (s, t, f) in told[a].items()}
            return tuple(text.partition(":")[0] for text in judge_reach(dead_ways(seen), seen))

        try:
            assert named("1") == ()
            hosts.drop_way(1, 2)
            assert named("2") == ("way n1>n2",)
            hosts.drop_way(1, 0)
            assert named("3") == ("row n1",)
            hosts.cut(1)
            assert named("4") == ("node n1",)
        finally:
            for process in processes:
                process.kill()
                process.join()
