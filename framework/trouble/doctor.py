r"""Doctor: has the agents of all nodes examine themselves and each other, and puts the answers into words.

    agents --versions, limits, speeds, clock--> NodeReport     pairs of agents, a round at a time --> WayReport
                                  \__________ fault_tolerance/detection/checkup.py judges __________/

Emulated nodes share one machine, so there everything is measured one after the other; else all nodes at once, and ways in
rounds of disjoint pairs. A node that seems slow is measured once more before it is named.

Rule of this file: it asks and words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fault_tolerance.detection.checkup import Checkup, NodeReport, WayReport, best_of, slow_nodes
from fault_tolerance.detection.pairtest import all_rounds, ring_rounds
from fault_tolerance.detection.reachability import dead_ways
from framework.cluster.cluster import Call, CallError, Remote
from framework.cluster.ray_calls import first_line
from framework.control.way_probe import probe_ways

ANSWER_S = 60.0
WAY_BYTES = 8 << 20
ALL_WAYS = 16  # more nodes than this are measured as a ring
Agents = Mapping[str, Remote]
K = TypeVar("K", bound=Hashable)


def examine(agents: Agents, hosts: Mapping[str, str], *, one_machine: bool) -> Checkup:
    """Everything that can be told before a start. `hosts`: the nodes' addresses. Takes some seconds."""
    reports = {node: _report(node, hosts[node], agent) for node, agent in agents.items()}
    well = {node: agent for node, agent in agents.items() if not reports[node].failure}
    for node, speeds in _speeds(well, one_machine).items():
        reports[node] = replace(reports[node], speeds=speeds)
    again = {node: well[node] for node in slow_nodes(tuple(reports.values()))}
    for node, speeds in _speeds(again, one_machine).items():
        reports[node] = best_of(reports[node], speeds)
    ways = _ways(well, one_machine)
    dead = dead_ways(probe_ways(well)) if any(way.failure for way in ways.values()) else ()
    return Checkup(tuple(reports.values()), ways, dead)


def words(checkup: Checkup) -> str:
    """The report for a person."""
    return "\n".join([*_table(checkup), "", *_matrix(checkup), *_verdict(checkup)])


def _report(node: str, host: str, agent: Remote) -> NodeReport:
    try:
        identity = dict(agent.ready().result(ANSWER_S))
        versions = dict(agent.call("probe", "versions").result(ANSWER_S))
        limits = dict(agent.call("probe", "limits").result(ANSWER_S))
        interface = str(agent.call("interface").result(ANSWER_S))
        offset, error = _clock(agent)
    except (CallError, TimeoutError) as problem:
        return NodeReport(node, host, {}, "", {}, {}, failure=first_line(str(problem)))
    versions |= {"holdfast": f"{identity['version']} ({identity['digest']})"}
    return NodeReport(node, host, versions, interface, limits, {}, offset, error)


def _clock(agent: Remote) -> tuple[float, float]:
    """(offset, bound of its error), of the quickest of some questions, as NTP does."""
    found = []
    for _ in range(5):
        before = time.time()
        theirs = float(agent.call("probe", "clock").result(ANSWER_S))
        after = time.time()
        found.append(((after - before) / 2, theirs - (before + after) / 2))
    error, offset = min(found)
    return offset, error


def _speeds(agents: Agents, one_machine: bool) -> dict[str, dict[str, float]]:
    answers = _each({node: partial(agent.call, "probe", "speeds") for node, agent in agents.items()}, one_by_one=one_machine)
    return {node: dict(answer) for node, answer in answers.items() if not isinstance(answer, str)}


def _ways(agents: Agents, one_machine: bool) -> dict[tuple[str, str], WayReport]:
    names = list(agents)
    rounds = all_rounds(range(len(names))) if len(names) <= ALL_WAYS else ring_rounds(range(len(names)))
    where = {node: agent.call("probe", "address").result(ANSWER_S) for node, agent in agents.items()}
    found: dict[tuple[str, str], WayReport] = {}
    for pairs in rounds:
        for forward in (True, False):
            ways = [(names[a], names[b]) if forward else (names[b], names[a]) for a, b in pairs]
            questions = {
                (source, target): partial(agents[target].call, "probe", "way", where[source], num_bytes=WAY_BYTES)
                for source, target in ways
            }
            for way, answer in _each(questions, one_by_one=one_machine).items():
                failure = answer if isinstance(answer, str) else ""
                latency, seconds = (0.0, 0.0) if failure else answer
                found[way] = WayReport(latency, seconds, WAY_BYTES, failure)
    return found


def _each(questions: Mapping[K, Callable[[], Call]], *, one_by_one: bool) -> dict[K, Any]:
    """The answers, or what went wrong as text; all at once or one after the other."""
    if one_by_one:
        return {key: _answer(ask()) for key, ask in questions.items()}
    calls = {key: ask() for key, ask in questions.items()}
    return {key: _answer(call) for key, call in calls.items()}


def _answer(call: Call) -> Any:
    try:
        return call.result(ANSWER_S)
    except (CallError, TimeoutError) as error:
        return first_line(str(error))


def _table(checkup: Checkup) -> Iterator[str]:
    yield f"{'node':<12}{'address':<17}{'cores':>6}{'memory':>10}{'shm':>10}{'copy':>12}{'compute':>14}{'clock':>10}  interface"
    for report in checkup.nodes:
        limits, speeds = report.limits, report.speeds
        yield (
            f"{report.node:<12}{report.host:<17}{limits.get('cores', 0):>6.0f}{limits.get('memory_free_bytes', 0) / 2**30:>6.1f} GiB"
            f"{limits.get('shm_bytes', 0) / 2**30:>6.1f} GiB{speeds.get('copy_bytes_per_s', 0) / 1e9:>7.1f} GB/s"
            f"{speeds.get('flops_per_s', 0) / 1e9:>6.0f} GFLOP/s{1e3 * report.clock_offset_s:>+7.1f} ms  {report.interface or report.failure}"
        )
    versions = {f"{name} {value}" for report in checkup.nodes for name, value in report.versions.items()}
    yield f"versions: {', '.join(sorted(versions))}"


def _matrix(checkup: Checkup) -> Iterator[str]:
    """One way a line for few nodes, else their spread."""
    for (source, target), way in sorted(checkup.ways.items()) if len(checkup.nodes) <= 8 else []:
        if not way.failure:
            yield f"{source} -> {target}: {1e6 * way.latency_s:.0f} us, {way.num_bytes / way.seconds / 1e9:.2f} GB/s"


def _verdict(checkup: Checkup) -> Iterator[str]:
    for finding in checkup.findings:
        yield f"{'wrong' if finding.must else 'odd'}: {finding.reason}"
    if not checkup.findings:
        yield f"nothing stands out among {len(checkup.nodes)} nodes and {len(checkup.ways)} ways"
