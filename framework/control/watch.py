"""Watch: from what is seen of a crew to the trouble it is in, or None.

    certain first:   a node that is gone > a process that is gone > an error of its own > no answer > no progress
    last resort:     a broken collective alone names nobody: wait a moment for better evidence

Ranks next to a dead one fail with it, so errors out of collectives are effects, never causes.

Rule of this file: pure. The controller looks, this decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framework.control.incident import HOLD, Trouble
from framework.plan import Plan

ALL_SILENT = 4.0
PATIENT = frozenset({"evaluate", "staging", "protection", "test"})


@dataclass(frozen=True, slots=True)
class Ended:
    """How the call that runs a rank ended: `died` (process or node), `error` or `restore_failed`, `collective`, `aborted`."""

    how: str
    evidence: str
    at: float
    node_lost: bool = False


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a crew. Times in seconds on the controller's monotonic clock, but `now`, which is that of a calendar."""

    now: float
    ended: Mapping[int, Ended]
    silent_s: Mapping[int, float]
    progress: Mapping[int, tuple[int, str]]
    quiet_s: float  # since the crew's newest step was reported
    dead_nodes: frozenset[str]
    draining: frozenset[str]
    vaults_lost: frozenset[str] = frozenset()
    leaving: frozenset[int] = frozenset()  # ranks whose process was asked to leave (SIGTERM)
    collective_broken_s: float = 0.0  # since the first rank was thrown out of a collective


@dataclass(frozen=True, slots=True)
class Limits:
    """The deadlines of one look. `stall_s` is the hang deadline that fits the step at hand; while a rank evaluates, stages
    or tests, the crew takes no step and has `patient_s`. All ranks at once are silent no sooner than after ALL_SILENT times
    `ping_timeout_s`: likelier than all of them is whoever listens away."""

    ping_timeout_s: float
    stall_s: float
    patient_s: float = 600.0
    evidence_s: float = 3.0


def judge(sight: Sight, plan: Plan, limits: Limits) -> Trouble | None:
    """The trouble a crew is in. None: nothing that must be acted on."""
    return (
        _lost_nodes(sight, plan)
        or _lost_processes(sight, plan)
        or _own_errors(sight, plan)
        or _silence(sight, plan, limits)
        or _broken_collective(sight, plan, limits)
        or _stall(sight, plan, limits)
        or _lost_vaults(sight, plan)  # for which a crew that still steps is asked to end, and no other
        or notice(sight, plan)
    )


def apart(plan: Plan, gone: Sequence[str], evidence: str, *, step: int, now: float, nodes: Sequence[str] = ()) -> Trouble:
    """Trouble that came when no crew was at work: machines of a plan are gone, else something on `nodes` failed."""
    ranks = tuple(rank for node in gone for rank in plan.ranks_on(node))
    return Trouble("node_loss" if gone else "crash", ranks, tuple(gone or nodes), evidence, step, now)


def _trouble(kind: str, ranks: list[int], evidence: str, sight: Sight, plan: Plan, silent_s: float = 0.0) -> Trouble:
    nodes = tuple(dict.fromkeys(plan.seats[r].node for r in ranks))
    return Trouble(kind, tuple(ranks), nodes, evidence, _step(sight), sight.now, silent_s)


def _step(sight: Sight) -> int:
    return max((step for step, _ in sight.progress.values()), default=0)


def _lost_nodes(sight: Sight, plan: Plan) -> Trouble | None:
    nodes = {n for n in sight.dead_nodes if n in plan.nodes}
    nodes |= {plan.seats[r].node for r, e in sight.ended.items() if e.node_lost}
    if not nodes:
        return None
    ranks = [r for r, seat in enumerate(plan.seats) if seat.node in nodes]
    silent = max((sight.silent_s.get(r, 0.0) for r in ranks), default=0.0)
    evidence = f"{', '.join(sorted(nodes))} gone with all its processes"
    return _trouble("node_loss", ranks, evidence, sight, plan, silent)


def _lost_processes(sight: Sight, plan: Plan) -> Trouble | None:
    ranks = sorted(r for r, e in sight.ended.items() if e.how == "died")
    if not ranks:
        return None
    silent = max(sight.silent_s.get(r, 0.0) for r in ranks)
    return _trouble("crash", ranks, sight.ended[ranks[0]].evidence, sight, plan, silent)


def _own_errors(sight: Sight, plan: Plan) -> Trouble | None:
    ranks = sorted((e.at, r) for r, e in sight.ended.items() if e.how in ("error", "restore_failed"))
    if not ranks:
        return None
    first = ranks[0][1]
    return _trouble("crash", [first], sight.ended[first].evidence, sight, plan)


def _silence(sight: Sight, plan: Plan, limits: Limits) -> Trouble | None:
    ranks = sorted(r for r, s in sight.silent_s.items() if s > limits.ping_timeout_s and r not in sight.ended)
    if not ranks:
        return None
    longest = max(sight.silent_s[r] for r in ranks)
    if 1 < len(ranks) == plan.layout.world and longest <= ALL_SILENT * limits.ping_timeout_s:
        return None
    return _trouble("hang", ranks, f"does not answer since {longest:.1f} s", sight, plan, longest)


def _lost_vaults(sight: Sight, plan: Plan) -> Trouble | None:
    nodes = sorted(n for n in sight.vaults_lost if n in plan.nodes)
    if not nodes:
        return None
    return Trouble("crash", (), tuple(nodes), "the vault process died", _step(sight), sight.now, remedy=HOLD)


def _broken_collective(sight: Sight, plan: Plan, limits: Limits) -> Trouble | None:
    ranks = sorted((e.at, r) for r, e in sight.ended.items() if e.how == "collective")
    if not ranks or sight.collective_broken_s < limits.evidence_s:
        return None
    first = ranks[0][1]
    evidence = f"a collective broke and nobody is known to be gone: {sight.ended[first].evidence}"
    return Trouble("crash", (), (), evidence, _step(sight), sight.now)


def _stall(sight: Sight, plan: Plan, limits: Limits) -> Trouble | None:
    """No progress. Blame who has not reached the phase that most ranks wait in, where that singles somebody out."""
    patient = any(phase in PATIENT for _, phase in sight.progress.values())
    limit = max(limits.stall_s, limits.patient_s) if patient else limits.stall_s
    if sight.quiet_s <= limit or not sight.progress:
        return None
    furthest = max(step for step, _ in sight.progress.values())
    behind = [r for r, (step, _) in sorted(sight.progress.items()) if step < furthest]
    ranks = behind if 0 < len(behind) <= len(sight.progress) // 2 else []
    evidence = f"no step for {sight.quiet_s:.1f} s, deadline {limit:.1f} s"
    return _trouble("hang", ranks, evidence, sight, plan, sight.quiet_s)


def notice(sight: Sight, plan: Plan) -> Trouble | None:
    """Whoever was asked to leave: whole nodes, or single processes."""
    nodes = [n for n in plan.nodes if n in sight.draining]
    ranks = [r for r, seat in enumerate(plan.seats) if seat.node in nodes or r in sight.leaving]
    if not ranks:
        return None
    alone = [str(r) for r in ranks if plan.seats[r].node not in nodes]
    told = [f"{', '.join(nodes)} asked to leave"] if nodes else []
    told += [f"the process of rank {', '.join(alone)} asked to leave by SIGTERM"] if alone else []
    return _trouble("preemption", ranks, "; ".join(told), sight, plan)
