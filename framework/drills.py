"""Drills: a run with faults beside its fault-free twin, and what must be true of the two.

    ledger      every sample used exactly once, whatever happened
    lost        no incident lost more steps than lie between two snapshots; one that could be prepared for lost none
    status      the run finished, and so did its twin
    losses      each step's loss within 1e-5 (relative) of the twin's; the held-out loss too
    incidents   what had to happen did, in this order; the same of machines that came and went
    state       the same bytes where the layout never changed, else every tensor within 1e-4 of the twin's
    verdict     what happened and to which rank was said, where the drill is about that

Rule of this file: pure, but for reading two run directories and their last checkpoints. It starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_tolerance.checkpoint import Checkpoint
from fault_tolerance.compare import differences
from fault_tolerance.shelf import newest
from framework import run_dir

LOSS_RTOL = 1e-5
STATE_ATOL = 1e-4


@dataclass(frozen=True, slots=True)
class Drill:
    """A named set: overrides of the config, and the faults on top of them.

    `kinds` are those of the incidents that must be the first, `news` what must be said of machines in this order, `lost`
    how many steps may be lost if that is not the interval of snapshots, `tier` where the state must
    come from in one of the incidents.
    """

    name: str
    about: str
    overrides: tuple[str, ...]
    faults: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    news: tuple[str, ...] = ()
    lost: int | None = None
    tier: str = ""
    verdict: tuple[str, int] | None = None  # the cause and the rank that an event must name


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant, whether it held, and what was seen."""

    what: str
    held: bool
    seen: str


BASE = (
    "model=tiny",
    "data=synthetic",
    "optim.num_steps=16",
    "optim.global_batch=8",
    "monitor=quiet",
    "cluster.num_nodes=4",
    "cluster.workers_per_node=2",
    "layout.pp=2",
    "layout.dp=2",
    "layout.tp=2",
    "fault_tolerance.tolerate=2",
    "fault_tolerance.every_steps=2",
)

FEW = (  # one worker a node: steps are short, so that machines have time to come back
    "model=tiny",
    "data=synthetic",
    "optim.global_batch=8",
    "monitor=quiet",
    "cluster.num_nodes=4",
    "cluster.workers_per_node=1",
    "layout.pp=2",
    "layout.dp=2",
    "layout.tp=1",
    "fault_tolerance.tolerate=2",
    "fault_tolerance.every_steps=2",
)
LONG = (*FEW, "optim.num_steps=120", "detect.quarantine_s=10")
FOUR = (*BASE[:5], "layout.pp=1", "layout.dp=4", "layout.tp=1", "fault_tolerance.tolerate=1", "fault_tolerance.every_steps=2")
PAIRS = (*FOUR, "cluster.num_nodes=2", "cluster.workers_per_node=2")

DRILLS = (
    Drill("worker", "a worker is killed and replaced in place", BASE, ("{step: 7, kind: kill_worker, rank: 3, phase: forward}",)),
    Drill("node", "a node is lost; the rest goes on under another layout", BASE, ("{step: 7, kind: kill_node, node: n1, phase: backward}",)),
    Drill(
        "pair",
        "two nodes are lost at once",
        BASE,
        ("{step: 7, kind: kill_node, node: n1, phase: forward}", "{step: 7, kind: kill_node, node: n2, phase: forward}"),
    ),
    Drill(
        "again",
        "a second node is lost while the first loss is being recovered from",
        BASE,
        ("{step: 7, kind: kill_node, node: n1, phase: forward}", "{step: 6, kind: kill_node, node: n3, phase: recovery}"),
    ),
    Drill(
        "spare",
        "a lost node is replaced by a spare, under the same layout",
        (*BASE, "cluster.spare_nodes=1"),
        ("{step: 7, kind: kill_node, node: n2, phase: optimizer}",),
        kinds=("node_loss",),
    ),
    Drill(
        "grow",
        "a lost node comes back and is grown onto, then another one is lost",
        LONG,
        (
            "{step: 6, kind: kill_node, node: n1, phase: backward}",
            "{step: 8, kind: add_node, node: n1}",
            "{step: 110, kind: kill_node, node: n2, phase: forward}",
        ),
        kinds=("node_loss", "resize", "node_loss"),
        news=("gone", "joined", "gone"),
    ),
    Drill(
        "flap",
        "a node that comes and goes is barred, and used again when that is over",
        LONG,
        tuple(
            f"{{step: {step}, kind: {kind}, node: n1}}"
            for step, kind in ((6, "kill_node"), (8, "add_node"), (30, "kill_node"), (32, "add_node"), (54, "kill_node"), (56, "add_node"))
        ),
        kinds=("node_loss",),
        news=("gone", "joined", "gone", "joined", "gone", "quarantine", "expired"),
    ),
    Drill(
        "preempt",
        "a node is asked to leave (SIGTERM) and taken away; the state is safe before it goes",
        LONG,
        ("{step: 7, kind: preempt, node: n1, phase: forward, severity: 15}",),
        kinds=("preemption",),
        news=("left",),
    ),
    Drill(
        "partition",
        "a node is out of reach for a while; what was there is fenced, and the node is used again",
        LONG,
        ("{step: 7, kind: partition, node: n1, phase: backward, severity: 12}",),
        kinds=("node_loss", "resize"),
        news=("gone", "joined"),
    ),
    Drill(
        "corrupt",
        "a block in memory is damaged and a node is lost; both are decoded",
        (*FEW, "optim.num_steps=16", "fault_tolerance.scrub_mb_s=0"),
        ("{step: 7, kind: corrupt_block, node: n2, severity: 1}", "{step: 8, kind: kill_node, node: n1, phase: forward}"),
        kinds=("node_loss",),
        tier="parity",
    ),
    Drill(
        "fallback",
        "more is damaged and lost than parity can mend; the run goes on from its checkpoint",
        (
            *FEW,
            "optim.num_steps=16",
            "fault_tolerance.scrub_mb_s=0",
            "fault_tolerance.tolerate=1",
            "fault_tolerance.durable.every_steps=4",
        ),
        ("{step: 7, kind: corrupt_block, node: n2, severity: 99}", "{step: 8, kind: kill_node, node: n1, phase: forward}"),
        kinds=("node_loss",),
        lost=4,
        tier="durable",
    ),
    Drill("stop", "a worker is stopped (SIGSTOP)", BASE, ("{step: 7, kind: stop_worker, rank: 5, phase: forward}",), verdict=("hang", 5)),
    Drill(
        "hang",
        "a worker never comes to a collective",
        PAIRS,
        ("{step: 9, kind: hang, rank: 2, severity: 0}",),
        verdict=("hang", 2),
    ),
    Drill("gil", "a worker holds its interpreter lock for ever", PAIRS, ("{step: 9, kind: hang, rank: 1, severity: 1}",), verdict=("hang", 1)),
    Drill(
        "straggler",
        "a worker gets a quarter of its time; it is named, and acted upon only if that pays",
        (*PAIRS, "optim.num_steps=60"),
        ("{step: 20, kind: slow_worker, rank: 2, severity: 4}",),
        verdict=("slow_compute", 2),
    ),
    Drill(
        "swap",
        "a slow machine is replaced by a spare, because the run is long enough for that to pay",
        (*FOUR, "cluster.num_nodes=4", "cluster.spare_nodes=1", "cluster.max_nodes=5", "optim.num_steps=300"),
        ("{step: 20, kind: slow_worker, rank: 2, severity: 5}",),
        verdict=("slow_compute", 2),
    ),
    Drill("nan", "a loss is no number, once", PAIRS, ("{step: 9, kind: nan, rank: 1}",), verdict=("nan", 1)),
    Drill(
        "flip",
        "one bit of one rank's parameters flips",
        (*PAIRS, "detect.digest_every=1"),
        ("{step: 9, kind: flip_bit, rank: 2}",),
        verdict=("corrupt", 2),
    ),
    Drill("raise", "a worker raises an error", BASE, ("{step: 7, kind: raise, rank: 2, phase: optimizer}",)),
)


PREPARED = ("preemption", "resize")  # kinds of incidents before which the state is made safe


def checks(run: str | Path, twin: str | Path, *, every_steps: int, drill: Drill | None = None) -> Iterator[Check]:
    """Every invariant of a run and its twin, from what they left behind."""
    summary, other = run_dir.summary(run) or {}, run_dir.summary(twin) or {}
    status = f"{summary.get('status')} and {other.get('status')}"
    yield Check("status", summary.get("status") == other.get("status") == "finished", status)
    rows, expected = run_dir.metrics(run), run_dir.metrics(twin)
    yield _ledger(rows, len(expected))
    incidents: Sequence[Mapping[str, Any]] = summary.get("incidents", ())
    lost = max((int(i["steps_lost"]) for i in incidents), default=0)
    allowed = every_steps if drill is None or drill.lost is None else drill.lost
    prepared = max((int(i["steps_lost"]) for i in incidents if i.get("kind") in PREPARED), default=0)
    seen = f"{lost} steps at most in {len(incidents)} incidents, {allowed} allowed; {prepared} in those that were prepared for"
    yield Check("lost", lost <= allowed and prepared == 0, seen)
    if drill is not None and drill.kinds:
        kinds = [str(i["kind"]) for i in incidents]
        yield Check("incidents", kinds[: len(drill.kinds)] == list(drill.kinds), ", ".join(kinds) or "none")
    if drill is not None and drill.tier:
        tiers = [str(i["tier"]) for i in incidents]
        yield Check("tier", drill.tier in tiers, ", ".join(tier or "unresolved" for tier in tiers) or "none")
    if drill is not None and drill.news:
        news = [str(e["cause"]) for e in run_dir.events(run) if e["kind"] == "node"]
        yield Check("machines", _in_order(drill.news, news), ", ".join(news) or "nothing was said of machines")
    yield _losses(rows, expected)
    same_layout = {row["layout"] for row in rows} == {row["layout"] for row in expected}
    if same_layout:
        equal = summary.get("state_sha256") == other.get("state_sha256") is not None
        yield Check("state", equal, f"sha256 {str(summary.get('state_sha256'))[:16]} and {str(other.get('state_sha256'))[:16]}")
    else:
        yield _state(run, twin)
    if drill is not None and drill.verdict is not None:
        yield _named(run, drill.verdict)


def _named(run: str | Path, verdict: tuple[str, int]) -> Check:
    """Whoever was named must be the one, and nobody else."""
    said = [(str(e["cause"]), *e["ranks"]) for e in run_dir.events(run) if e["kind"] == "verdict" and e["ranks"]]
    told = ", ".join(f"{cause} of rank {' '.join(map(str, ranks))}" for cause, *ranks in dict.fromkeys(said)) or "nobody"
    return Check("verdict", set(said) == {verdict}, f"named: {told}; to be named: {verdict[0]} of rank {verdict[1]}")


def _in_order(wanted: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether `seen` has all that is wanted, in this order, whatever lies between."""
    rest = iter(seen)
    return all(word in rest for word in wanted)


def _ledger(rows: Sequence[Mapping[str, Any]], num_steps: int) -> Check:
    """The rows that counted must cover the samples without gap or overlap."""
    following = 0
    for row in rows:
        first, last = row["samples"]
        if first != following:
            return Check("ledger", False, f"step {row['step']} begins at sample {first}, {following} was next")
        following = last + 1
    return Check("ledger", len(rows) == num_steps, f"{following} samples, each once, in {len(rows)} of {num_steps} steps")


def _losses(rows: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> Check:
    pairs = [(row["loss"], twin["loss"]) for row, twin in zip(rows, expected, strict=False)]
    worst = max((abs(a - b) / abs(b) for a, b in pairs), default=float("inf"))
    return Check("losses", worst <= LOSS_RTOL, f"{worst:.1e} apart at most, {LOSS_RTOL:.0e} allowed")


def _state(run: str | Path, twin: str | Path) -> Check:
    paths = [newest(f"{directory}/checkpoints") for directory in (run, twin)]
    if None in paths:
        return Check("state", False, "no checkpoint at the end to compare")
    a, b = (Checkpoint.open(str(path)) for path in paths)
    try:
        worst = max((difference.max_abs for difference in differences(a, b)), default=0.0)
    finally:
        a.close()
        b.close()
    return Check("state", worst <= STATE_ATOL, f"{worst:.1e} apart at most, {STATE_ATOL:.0e} allowed")
