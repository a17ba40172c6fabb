"""Layout choice: every layout a model admits on some workers, scored, and the best of them with its reason.

    pp   up to one layer a stage         tp   divides heads, inner width and (sequence parallel) the sequence
    dp   any number of replicas          workers may be left idle

Of the replica counts between which the fullest replica has equally many samples, only the least (it talks least) and
the greatest (it holds least) are scored: no other can be better. That keeps thousands of workers within a second.

Rule of this file: pure. What a layout costs is `cost.py`'s matter, what to do with the answer the plan's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from framework.planning.cost import Cost, Method, ModelCost, predict
from framework.planning.rates import GIB, Rates
from parallel.layout import Layout
from parallel.stages import num_stages


def admissible(model: ModelCost, *, num_workers: int, method: Method) -> Iterator[Layout]:
    """Every layout worth scoring on at most `num_workers` workers."""
    lengths = [model.num_heads, model.ffn_dim, *([model.seq_len] if method.sequence_parallel else [])]
    tps = [tp for tp in range(1, min(num_workers, model.num_heads) + 1) if not any(n % tp for n in lengths)]
    for tp in tps:
        for pp in range(1, min(num_workers // tp, model.num_layers) + 1):
            if num_stages(method.schedule, pp) <= model.num_layers:
                dps = _replicas(method.global_batch, num_workers // (tp * pp))
                yield from (Layout(pp=pp, dp=dp, tp=tp) for dp in dps)


def candidates(
    model: ModelCost, *, num_workers: int, method: Method, rates: Rates, num_microbatches: int | None = None
) -> list[Cost]:
    """All admissible layouts, those that fit the memory first, then by step time, then by workers used.

    With `num_microbatches` None, each layout gets the number that is fastest for it.
    """
    costs = [
        _with_microbatches(model, layout, num_microbatches, method=method, rates=rates)
        for layout in admissible(model, num_workers=num_workers, method=method)
    ]
    return sorted(costs, key=lambda c: (not c.fits, c.step_s, c.layout.world, c.layout))


def best(
    model: ModelCost, *, num_workers: int, method: Method, rates: Rates, num_microbatches: int | None = None
) -> tuple[Cost, str]:
    """The fastest layout that fits, and why. Raises ValueError, with the bytes that are missing, where none fits."""
    scored = candidates(model, num_workers=num_workers, method=method, rates=rates, num_microbatches=num_microbatches)
    if not scored or not scored[0].fits:
        raise ValueError(_no_fit(scored, model, num_workers))
    return scored[0], _reason(scored)


def microbatch_choices(layout: Layout, global_batch: int) -> list[int]:
    """Numbers of microbatches to consider: powers of two, times pp where there is a pipeline; the least one first."""
    most = max(layout.pp, -(-global_batch // layout.dp))
    return [layout.pp << k for k in range(most.bit_length()) if layout.pp << k <= most]


def _replicas(global_batch: int, most: int) -> list[int]:
    """Numbers of replicas to consider, ascending; more replicas than samples would train on nothing."""
    found, dp, most = set(), 1, min(most, global_batch)
    while dp <= most:
        fullest = -(-global_batch // dp)
        last = most if fullest == 1 else min(most, (global_batch - 1) // (fullest - 1))
        found |= {dp, last}
        dp = last + 1
    return sorted(found)


def _with_microbatches(
    model: ModelCost, layout: Layout, num_microbatches: int | None, *, method: Method, rates: Rates
) -> Cost:
    if num_microbatches is not None:
        count = -(-num_microbatches // layout.pp) * layout.pp if layout.pp > 1 else num_microbatches
        return predict(model, layout, count, method=method, rates=rates)
    choices = microbatch_choices(layout, method.global_batch)
    costs = [predict(model, layout, count, method=method, rates=rates) for count in choices]
    fitting = [cost for cost in costs if cost.fits]
    return min(fitting, key=lambda c: c.step_s) if fitting else min(costs, key=lambda c: c.memory_bytes)


def _reason(scored: Sequence[Cost]) -> str:
    fit = [cost for cost in scored if cost.fits]
    others = ", ".join(f"{cost.layout} {cost.step_s:.3g} s" for cost in fit[1:4])
    parts = [fit[0].reason, f"the best of {len(fit)} layouts that fit" + (f", before {others}" if others else "")]
    if len(fit) < len(scored):
        parts.append(f"{len(scored) - len(fit)} do not fit in memory")
    return "; ".join(parts)


def _no_fit(scored: Sequence[Cost], model: ModelCost, num_workers: int) -> str:
    if not scored:
        return f"layout: must have at least 1 worker, got {num_workers}; add nodes"
    least = min(scored, key=lambda cost: cost.memory_bytes)
    return (
        f"layout: a model of {model.params:,} parameters needs {least.memory_bytes / GIB:.3g} GiB per worker even under "
        f"{least.layout}, got {least.memory_limit / GIB:.3g} GiB on each of {num_workers} workers; add workers or memory, "
        "or use layout.activation_checkpointing=true or layout.precision=bf16"
    )
