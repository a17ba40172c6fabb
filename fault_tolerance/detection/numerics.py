"""Numerics: is this step's loss and gradient to be believed, who spoils it, and what then.

    loss, gradient norms by rank -> NaN anywhere?   one rank only   -> that rank
                                    spike?          k sigma over the recent past
                                    replicas equal? digests of parameters, the odd one out

    then:  retry the step once (a flipped bit does not come back), skip its batch, roll back to a snapshot from before
           it; at most `max_skips` in a row, then stop

Rule of this file: pure; numbers and digests in, verdicts and decisions out.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fault_tolerance.detection.verdict import Kind, Topology, Verdict

LEAST_HISTORY = 16


class Remedy(StrEnum):
    """What to do with a step."""

    KEEP = "keep"
    RETRY = "retry"  # the same batch from the state before it
    SKIP = "skip"  # the state before it, the next batch
    ROLL_BACK = "roll_back"  # the state of an older snapshot, then skip what spoilt it
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a step, and why."""

    remedy: Remedy
    reason: str


def sigmas_above(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations a value lies above the median of its past; 0 while there is too little of it."""
    past = [v for v in history if math.isfinite(v)]
    if len(past) < LEAST_HISTORY or not math.isfinite(value):
        return 0.0
    middle = statistics.median(past)
    spread = 1.4826 * statistics.median(abs(v - middle) for v in past)
    return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)


def judge_ranks(values: Mapping[int, float], topology: Topology, *, ratio: float = 50.0) -> list[Verdict]:
    """Whose share of a step is not finite, or far above what its peers of the same stage have.

    `values` is one number a rank before any reduction: the squared norm of its own gradient, or its loss. If most ranks
    are not finite, the model is, and nobody is named.
    """
    bad = [rank for rank, v in sorted(values.items()) if not math.isfinite(v)]
    if bad:
        named = tuple(bad) if 2 * len(bad) <= len(values) else ()
        who = (
            f"{list(named)} of {len(values)} ranks"
            if named
            else f"{len(bad)} of {len(values)} ranks: the model diverges"
        )
        return [
            Verdict(Kind.NAN, named, topology.on(named), f"not a number on {who}", confidence=0.95 if named else 0.6)
        ]
    out = []
    for rank, value in sorted(values.items()):
        others = [abs(values[p]) for p in topology.peers(rank) if p in values]
        usual = statistics.median(others) if others else 0.0
        if usual > 0 and abs(value) > ratio * usual:
            reason = f"rank {rank}: {value:.3g} where its peers have {usual:.3g}"
            times = abs(value) / usual
            out.append(Verdict(Kind.OUTLIER, (rank,), topology.on([rank]), reason, confidence=0.8, severity=times))
    return out


def judge_replicas(digests: Mapping[int, Hashable], topology: Topology) -> list[Verdict]:
    """Which rank's parameters differ from those it must equal: `digests` of what is replicated, by rank.

    Ranks are compared where their digests are given the same first element, the name of what was hashed. Of two that
    differ, both are named, for nobody can tell.
    """
    by_name: dict[Hashable, dict[int, Hashable]] = {}
    for rank, digest in digests.items():
        name, value = digest if isinstance(digest, tuple) and len(digest) == 2 else ("all", digest)
        by_name.setdefault(name, {})[rank] = value
    out = []
    for name, values in sorted(by_name.items(), key=lambda item: str(item[0])):
        counts = Counter(values.values())
        if len(counts) < 2:
            continue
        (usual, votes), (_, next_votes) = counts.most_common(2)
        split = votes == next_votes
        odd = tuple(rank for rank, v in sorted(values.items()) if split or v != usual)
        reason = f"{name}: ranks {list(odd)} differ from " + ("each other" if split else f"the other {votes}")
        out.append(Verdict(Kind.CORRUPT, odd, topology.on(odd), reason, confidence=0.6 if split else 0.99))
    return out


def decide(
    loss: float,
    grad_norm: float,
    history: Sequence[float],
    *,
    spike_sigma: float | None,
    max_skips: int,
    skipped_in_a_row: int,
    retried: bool,
    applied: bool = False,
) -> Decision:
    """What to do with a step whose global loss and gradient norm are these; equal on all ranks, so all decide alike.

    `history` are the losses before; `retried`: this batch has been tried twice already; `applied`: the update was made,
    so the state before it must come from a snapshot.
    """
    sigmas = sigmas_above(loss, history)
    broken = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not broken and (spike_sigma is None or sigmas < spike_sigma):
        return Decision(Remedy.KEEP, f"loss {loss:.4g}, {sigmas:.1f} sigma")
    what = (
        f"loss {loss:.4g}, gradient norm {grad_norm:.4g}" if broken else f"loss {loss:.4g} is {sigmas:.1f} sigma high"
    )
    if skipped_in_a_row >= max_skips:
        return Decision(
            Remedy.STOP, f"{what}; {skipped_in_a_row} steps in a row were left out, {max_skips} are allowed"
        )
    if applied:
        return Decision(Remedy.ROLL_BACK, f"{what}, after the update; back to the snapshot before it")
    if not retried:
        return Decision(Remedy.RETRY, f"{what}; once more, it may have been a flipped bit")
    return Decision(Remedy.SKIP, f"{what}, twice; its batch is left out")
