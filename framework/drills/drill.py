"""Drills: a run with faults beside its fault-free twin, and what must be true of the two.

    ledger      every sample used exactly once, whatever happened
    lost        no incident lost more steps than lie between two snapshots; one that could be prepared for lost none
    status      the run finished, and so did its twin; or it ended with the exit code and the last word that fit its fault
    verdict     what happened and to which rank was said, where the drill is about that
    shares      a slow replica took fewer samples than the others, where the drill is about that
    clean       no process, no temporary file and no shared memory is left of it
    times       what an incident tells of its own times is what the clock says
    losses      each step's loss within 1e-5 (relative) of the twin's; the held-out loss too
    incidents   what had to happen did, in this order; the same of machines that came and went
    state       the same bytes where layout and shares never changed, else every tensor within 1e-4 of the twin's

Rule of this file: pure, but for reading two run directories and their last checkpoints. It starts nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from fault_tolerance.checkpoints.compare import differences
from fault_tolerance.checkpoints.shelf import newest
from framework import run_dir
from framework.drills.strikes import Hit, Strike

LOSS_RTOL = 1e-5
STATE_ATOL = 1e-4
TIME_S = 1.0  # how far told times may be from the clock's: a machine that does much else looks late, and reports late
PREPARED = ("preemption", "resize")  # kinds of incidents before which the state is made safe
TOLD = ("hang", "mismatch", "nan", "corrupt")  # at once and for certain; deaths are seen, who is slow is tested
STRUCK_AT_ONCE = ("kill_worker", "kill_agent", "kill_node")


@dataclass(frozen=True, slots=True)
class Drill:
    """A named set: overrides of the config, faults from within and strikes from outside, and how the run must end.

    `says`: words that its last word must have. A run that is interrupted is resumed, and the two together are judged.
    `kinds` are those of the incidents that must be the first, `news` what must be said of machines in this order, `lost`
    how many steps may be lost if that is not the interval of snapshots, `tier` where the state must
    come from in one of the incidents. `loose`: the last strikes may come too late, after the run's end.
    """

    name: str
    about: str
    overrides: tuple[str, ...]
    faults: tuple[str, ...] = ()
    strikes: tuple[Strike, ...] = ()
    exit_code: int = 0
    says: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    news: tuple[str, ...] = ()
    lost: int | None = None
    tier: str = ""
    verdict: tuple[str, int] | None = None  # the cause and the rank that an event must name
    shares: bool = False  # whether replicas must have taken unequal ones
    loose: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant, whether it held, and what was seen."""

    what: str
    held: bool
    seen: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run's process ended, what hit it meanwhile, and what of its cluster was still there afterwards."""

    exit_code: int
    hits: tuple[Hit, ...] = ()
    left_behind: tuple[str, ...] = ()


def ending(drill: Drill, run: str | Path, end: Ending) -> Iterator[Check]:
    """What must be true of a run's end alone."""
    summary = run_dir.summary(run) or {}
    yield Check("exit", end.exit_code == drill.exit_code, f"code {end.exit_code}, {drill.exit_code} expected")
    word = str(summary.get("reason") or "")
    if missing := [text for text in drill.says if text not in word]:
        yield Check("word", False, f"{missing[0]!r} is not in the last word: {word or 'none'}")
    elif drill.says:
        yield Check("word", True, word)
    missed = [str(hit.strike) for hit in end.hits if not hit.pids]
    met = f"{len(end.hits)} of {len(drill.strikes)} strikes" + (f", met nobody: {'; '.join(missed)}" if missed else "")
    if drill.strikes:
        yield Check("struck", len(end.hits) == len(drill.strikes) or (drill.loose and bool(end.hits)), met)
    yield Check("clean", not end.left_behind, ", ".join(end.left_behind[:3]) or "no process and no file is left")
    yield from _times(run, summary, end.hits)


def checks(
    run: str | Path,
    twin: str | Path,
    *,
    every_steps: int,
    durable_steps: int = 0,
    drill: Drill | None = None,
    before: str | Path | None = None,
) -> Iterator[Check]:
    """Every invariant of a run and its twin, from what they left behind. `before`: the run that this one resumed."""
    summary, other = run_dir.summary(run) or {}, run_dir.summary(twin) or {}
    status = f"{summary.get('status')} and {other.get('status')}"
    yield Check("status", summary.get("status") == other.get("status") == "finished", status)
    rows, expected = run_dir.metrics(run), run_dir.metrics(twin)
    if before is not None:
        first = rows[0]["step"] if rows else 1
        rows = [row for row in run_dir.metrics(before) if row["step"] < first] + rows
    yield _ledger(rows, len(expected))
    incidents: Sequence[Mapping[str, Any]] = summary.get("incidents", ())
    yield _lost(incidents, every_steps if drill is None or drill.lost is None else drill.lost, durable_steps)
    if drill is not None:
        yield from _happened(drill, incidents, run)
    yield _losses(rows, expected)
    ways, usual = ({(row["layout"], str(row.get("shares"))) for row in told} for told in (rows, expected))
    if ways == usual:
        equal = summary.get("state_sha256") == other.get("state_sha256") is not None
        yield Check("state", equal, f"sha256 {str(summary.get('state_sha256'))[:16]} and {str(other.get('state_sha256'))[:16]}")
    else:
        yield _state(run, twin)
    if drill is not None and drill.verdict is not None:
        yield _named(run, drill.verdict)
    if drill is not None and drill.shares:
        yield _shared(rows, expected)


def _lost(incidents: Sequence[Mapping[str, Any]], every_steps: int, durable_steps: int) -> Check:
    """A state that had to come from storage is as old as the newest checkpoint may be; any other, as the newest snapshot."""
    allowed = [every_steps + (durable_steps if i["tier"] == "durable" else 0) for i in incidents]
    lost = [int(i["steps_lost"]) for i in incidents]
    held = all(steps <= limit for steps, limit in zip(lost, allowed, strict=True))
    prepared = max((int(i["steps_lost"]) for i in incidents if i["kind"] in PREPARED), default=0)
    seen = f"{max(lost, default=0)} steps at most in {len(lost)} incidents, {max(allowed, default=every_steps)} allowed"
    return Check("lost", held and prepared == 0, f"{seen}; {prepared} in those that were prepared for")


def _happened(drill: Drill, incidents: Sequence[Mapping[str, Any]], run: str | Path) -> Iterator[Check]:
    """What a drill is about must have happened."""
    if drill.kinds:
        kinds = [str(i["kind"]) for i in incidents]
        yield Check("incidents", kinds[: len(drill.kinds)] == list(drill.kinds), ", ".join(kinds) or "none")
    if drill.tier:
        tiers = [str(i["tier"]) for i in incidents]
        yield Check("tier", drill.tier in tiers, ", ".join(tier or "unresolved" for tier in tiers) or "none")
    if drill.news:
        news = [str(e["cause"]) for e in run_dir.events(run) if e["kind"] == "node"]
        yield Check("machines", _in_order(drill.news, news), ", ".join(news) or "nothing was said of machines")


def _named(run: str | Path, verdict: tuple[str, int]) -> Check:
    """Whoever was named must be the one, and nobody else, but for those that were killed, and those suspected of being slow for
    as long as no test has confirmed it: on a busy machine somebody is slow now and then.
    """
    named = [e for e in run_dir.events(run) if e["kind"] == "verdict" and e["ranks"]]
    named = [e for e in named if e["cause"] in (verdict[0], *TOLD) or e.get("confirmed")]
    said = [(str(e["cause"]), *e["ranks"]) for e in named]
    told = ", ".join(f"{cause} of rank {' '.join(map(str, ranks))}" for cause, *ranks in dict.fromkeys(said)) or "nobody"
    return Check("verdict", set(said) == {verdict}, f"named: {told}; to be named: {verdict[0]} of rank {verdict[1]}")


def _shared(rows: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> Check:
    """Unequal shares, whole batches all the same; what came of it is told and not judged, for a busy machine's clock says little."""
    shared = [row for row in rows if row.get("shares")]
    whole = all(sum(row["shares"]) == row["samples"][1] - row["samples"][0] + 1 for row in shared)
    ways = "; ".join(dict.fromkeys(", ".join(map(str, row["shares"])) for row in shared)) or "none but equal ones"
    others = [row for row in rows if not row.get("shares")]
    times = [f"{statistics.median(r['step_time_s'] for r in told):.2f}" for told in (expected, others, shared) if told]
    return Check("shares", bool(shared) and whole, f"{ways}; seconds a step, twin, equal, unequal: {', '.join(times)}")


def _in_order(wanted: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether `seen` has all that is wanted, in this order, whatever lies between."""
    rest = iter(seen)
    return all(word in rest for word in wanted)


def _times(run: str | Path, summary: Mapping[str, Any], hits: Sequence[Hit]) -> Iterator[Check]:
    """What the incidents tell of their times, against the calendar's clock: from the strike to the event that ends it."""
    ends = {e["incident"]["detected_at"]: e["time"] for e in run_dir.events(run) if e["kind"] in ("recovered", "resized") and "incident" in e}
    told, wrong = [], []
    for incident in summary.get("incidents", ()):
        causes = [hit.at for hit in hits if hit.pids and hit.at < incident["detected_at"] and hit.strike.kind in STRUCK_AT_ONCE]
        end = ends.get(incident["detected_at"])
        if end is None or not causes or incident["kind"] not in ("crash", "node_loss") or incident.get("remedy"):
            continue  # what was planned counts from the crew's last step
        clock = end - causes[-1]
        told.append(f"{incident['total_s']:.1f} s ({clock:.1f} by the clock), restore {incident['restore_s']:.2f}")
        if abs(clock - incident["total_s"]) > TIME_S + 0.1 * clock:
            wrong.append(told[-1])
    if told:
        yield Check("times", not wrong, "back after " + "; ".join(wrong or told))


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
