"""Checkup: what the probes of all nodes say, and which node or way is the odd one out.

    versions      must be equal                         limits    must not be too small, and not unlike the others'
    speeds        at least 1/1.25 of the median         ways      by the delay matrix: a cell, a row, a column, a node
    clocks        within the error of the question, or 50 ms     dead ways by direction (`reachability.py`)

Rule of this file: pure; a finding says whose it is, what is usual, and what to do. Sources: DLRover's pre-check, GREYHOUND's passes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fault_tolerance.detection.pairtest import judge_ways
from fault_tolerance.detection.reachability import Dead
from fault_tolerance.detection.verdict import Topology
from parallel.layout import Layout

SLOW = 1.25
CLOCK_S = 0.05
SMALL_SHM_BYTES = 256 << 20
FEW_FILES = 1024
SPEEDS = {"copy_bytes_per_s": "copies memory", "flops_per_s": "multiplies matrices"}
GB = 1e9
OPEN_PORTS = "open the ports between the nodes, or choose the interface by GLOO_SOCKET_IFNAME"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What is known of one node. `clock_error_s` bounds the error of `clock_offset_s`, which is against whoever asked."""

    node: str
    host: str
    versions: Mapping[str, str]
    interface: str
    limits: Mapping[str, float]
    speeds: Mapping[str, float]
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class WayReport:
    """From one node to another: latency, and seconds of a message."""

    latency_s: float
    seconds: float
    num_bytes: int
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. `must`: no training should start with it."""

    nodes: tuple[str, ...]
    reason: str
    must: bool = False


@dataclass(frozen=True, slots=True)
class Checkup:
    """Everything that was asked, and what stands out. `dead`: what was found when some way did not work."""

    nodes: tuple[NodeReport, ...]
    ways: Mapping[tuple[str, str], WayReport] = field(default_factory=dict)
    dead: tuple[Dead, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The worst first."""
        found = [*_unreachable(self), *_versions(self.nodes), *_limits(self.nodes), *_speeds(self.nodes), *_clocks(self.nodes), *_slow_ways(self)]
        return tuple(sorted(found, key=lambda finding: not finding.must))


def slow_nodes(nodes: tuple[NodeReport, ...]) -> tuple[str, ...]:
    """Those whose speeds stand out: worth measuring again before anything is said."""
    return tuple(dict.fromkeys(name for finding in _speeds(nodes) for name in finding.nodes))


def best_of(report: NodeReport, again: Mapping[str, float]) -> NodeReport:
    """With a second measurement of its speeds: a busy moment only ever makes a node slower."""
    return replace(report, speeds={name: max(value, again.get(name, 0.0)) for name, value in report.speeds.items()})


def _unreachable(checkup: Checkup) -> Iterator[Finding]:
    for report in checkup.nodes:
        if report.failure:
            yield Finding((report.node,), f"{report.node} cannot be examined: {report.failure}", must=True)
    told = {frozenset(dead.ends) for dead in checkup.dead}
    for dead in checkup.dead:
        yield Finding(dead.ends, f"{dead}: {dead.why}; {OPEN_PORTS}", must=True)
    for (source, target), way in checkup.ways.items():
        if way.failure and frozenset((source, target)) not in told:
            yield Finding((source, target), f"{target} cannot reach {source}: {way.failure}; {OPEN_PORTS}", must=True)


def _versions(nodes: tuple[NodeReport, ...]) -> Iterator[Finding]:
    for name in sorted({name for report in nodes for name in report.versions}):
        values = {report.node: report.versions.get(name, "none") for report in nodes if not report.failure}
        usual, _ = Counter(values.values()).most_common(1)[0]
        for node, value in values.items():
            if value != usual:
                yield Finding((node,), f"{node} has {name} {value}, the others {usual}; install the same on every node", must=True)


def _limits(nodes: tuple[NodeReport, ...]) -> Iterator[Finding]:
    for report in nodes:
        limits = report.limits
        if 0 < limits.get("shm_bytes", 0) < SMALL_SHM_BYTES:
            yield Finding(
                (report.node,), f"{report.node} has {limits['shm_bytes'] / 2**20:.0f} MiB of shared memory; give the container more (--shm-size)"
            )
        if 0 < limits.get("open_files", 0) < FEW_FILES:
            yield Finding((report.node,), f"{report.node} lets a process open {limits['open_files']:.0f} files; raise ulimit -n")
    for name in ("cores", "shm_bytes"):
        values = {report.node: report.limits[name] for report in nodes if name in report.limits}
        usual = statistics.median(values.values()) if values else 0.0
        for node, value in values.items():
            if usual > 0 and value < usual / 2:
                yield Finding((node,), f"{node} has {value:g} {name}, usual are {usual:g}")


def _speeds(nodes: tuple[NodeReport, ...]) -> Iterator[Finding]:
    for name, what in SPEEDS.items():
        values = {report.node: report.speeds[name] for report in nodes if report.speeds.get(name)}
        if len(values) < 2:
            continue
        usual = statistics.median_high(values.values())
        for node, value in values.items():
            if value * SLOW <= usual:
                yield Finding((node,), f"{node} {what} at {value / GB:.1f} G/s, usual are {usual / GB:.1f} G/s: {usual / value:.2f} times slower")


def _clocks(nodes: tuple[NodeReport, ...]) -> Iterator[Finding]:
    offsets = [report.clock_offset_s for report in nodes if not report.failure]
    usual = statistics.median(offsets) if offsets else 0.0
    for report in nodes:
        off = report.clock_offset_s - usual
        if not report.failure and abs(off) > max(CLOCK_S, 2 * report.clock_error_s):
            yield Finding((report.node,), f"{report.node}'s clock is off by {off:+.2f} s; logs will not line up, switch on time synchronisation")


def _slow_ways(checkup: Checkup) -> Iterator[Finding]:
    names = [report.node for report in checkup.nodes]
    seat = {name: rank for rank, name in enumerate(names)}
    if len(names) < 3:
        return  # of two nodes' ways neither is the odd one
    topology = Topology(Layout(dp=len(names)), tuple(names))
    seconds = {(seat[a], seat[b]): way.seconds for (a, b), way in checkup.ways.items() if not way.failure}
    for verdict in judge_ways(seconds, topology):
        yield Finding(verdict.nodes, verdict.reason)
