"""Outlook: everything that would be decided, as text, for `holdfast plan`. Nothing is started.

The nodes are taken as configured: emulated ones on this machine, or those of a cluster that was asked (`ray_rooms.py`).

Rule of this file: it words decisions that `plan.py`, `placement.py` and `budget.py` take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fault_tolerance.coding.placement import limits, plan_groups
from fault_tolerance.snapshots import budget as memory_budget
from fault_tolerance.snapshots.room import room
from fault_tolerance.snapshots.slab import slab_of
from framework.cluster.ray_rooms import Rooms
from framework.config import Config
from framework.data.readable import read_from
from framework.plan import Place, Plan, Source, make_plan
from framework.planning.devices import decide
from framework.planning.planner import Planner
from parallel.atlas import Atlas

SHOWN = 8  # layouts
STATE_WORDS = "parameters and both moments, fp32"


def outlook(config: Config, rooms: Rooms | None = None) -> str:
    """The plan as lines of `key: value`. `rooms`: what the nodes of a cluster said. Raises ValueError for what would be refused
    at the start.
    """
    device = decide(config, gpus_per_worker=None if rooms is None else rooms.gpus_per_worker)
    config = replace(config, cluster=replace(config.cluster, device=device.kind))
    planner = Planner(config)
    plan = make_plan("plan", planner.wish(), planner.situation(places_of(config, rooms), source=first_source(config), generation=0))
    atlas = planner.atlas(plan.layout, plan.schedule)
    lines = [*_work(config, planner, plan), ("device", str(device)), *_seats(plan, atlas), *_protection(config, plan, atlas, rooms)]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def places_of(config: Config, rooms: Rooms | None = None) -> tuple[Place, ...]:
    """The nodes as configured, all alive and empty; of a cluster that was asked those that could hold the workers, as many as
    are wanted, and stand-ins for those that are missing.
    """
    cluster = config.cluster
    domains = cluster.domains if isinstance(cluster.domains, tuple) else None
    wanted = cluster.num_nodes + cluster.spare_nodes
    found = list(rooms.domains)[:wanted] if rooms is not None else []
    names = [*found, *(f"n{i}" for i in range(len(found), wanted))]
    known = {} if rooms is None else rooms.domains
    return tuple(
        Place(name, cluster.workers_per_node, domains[i] if domains else known.get(name, name)) for i, name in enumerate(names)
    )


def first_source(config: Config) -> Source:
    """Where a first generation's state would come from."""
    return Source("fresh", 0) if config.resume is None else Source("durable", 0, config.resume)


def node_bytes(plan: Plan, atlas: Atlas) -> dict[str, int]:
    """Bytes of state that each node of a plan keeps for itself."""
    return {node: sum(slab_of(atlas, rank).nbytes for rank in plan.ranks_on(node)) for node in plan.nodes}


def _check_here(budget: Mapping[str, memory_budget.NodeBudget]) -> None:
    here = room()
    memory_budget.check(budget, dict.fromkeys(budget, here))


def _budget(config: Config, plan: Plan, atlas: Atlas) -> dict[str, memory_budget.NodeBudget]:
    size = config.fault_tolerance.group_size or len(plan.nodes)
    groups = plan_groups(dict(plan.domains), tolerate=plan.tolerate, group_size=max(size, plan.tolerate + 1))
    return memory_budget.budget(groups, node_bytes(plan, atlas), chunk_bytes=config.fault_tolerance.chunk_bytes)


def _work(config: Config, planner: Planner, plan: Plan) -> Iterator[tuple[str, str]]:
    optim, tokens = config.optim, config.optim.global_batch * config.data.seq_len
    atlas = planner.atlas(plan.layout, plan.schedule)
    params = sum(math.prod(spec.shape) for spec in atlas.specs if spec.name.startswith("param/"))
    yield "model", f"{params:,} parameters, {atlas.num_layers} layers, vocabulary {planner.model.vocab_size}"
    source = read_from(config.data) if config.cluster.address == "local" else config.data.kind
    yield "data", f"{source}, {config.data.seq_len} tokens a sample"
    yield "optimizer", f"AdamW, peak rate {optim.lr:g}, {optim.schedule} over {optim.schedule_steps} steps, {optim.warmup_steps} to warm up"
    yield "batch", f"{optim.global_batch} samples = {tokens:,} tokens; {optim.num_steps} steps = {optim.num_steps * tokens:,} tokens"
    yield "layout", f"pp {plan.layout.pp} x dp {plan.layout.dp} x tp {plan.layout.tp}, {plan.schedule}, {_microbatches(config, plan)}, {_engine(config)}"
    yield "reason", plan.reason
    for option in plan.options[:SHOWN]:
        yield "option", str(option)
    if len(plan.options) > SHOWN:
        yield "option", f"and {len(plan.options) - SHOWN} that are slower"


def _microbatches(config: Config, plan: Plan) -> str:
    wish = config.layout.num_microbatches
    more = "" if plan.num_microbatches == wish else f" (layout.num_microbatches={wish}, in multiples of pp)"
    return f"{plan.num_microbatches} microbatches" + more


def _engine(config: Config) -> str:
    layout = config.layout
    if layout.engine == "fsdp":
        return "FSDP2"
    return f"DeepSpeed ZeRO-{layout.zero_stage}" + (", optimizer on the host" if layout.offload_optimizer else "")


def _seats(plan: Plan, atlas: Atlas) -> Iterator[tuple[str, str]]:
    kept = node_bytes(plan, atlas)
    for node in plan.nodes:
        ranks = ", ".join(map(str, plan.ranks_on(node)))
        yield f"node {node}", f"ranks {ranks}; {_mib(kept[node])} of state ({STATE_WORDS})"


def _protection(config: Config, plan: Plan, atlas: Atlas, rooms: Rooms | None) -> Iterator[tuple[str, str]]:
    keeping = config.fault_tolerance
    if keeping.every_steps == 0:
        yield "snapshots", "none (fault_tolerance.every_steps=0)"
        return
    every = "as often as cost and failure rate suggest" if keeping.every_steps == "auto" else f"every {keeping.every_steps} steps"
    if keeping.max_steps_lost is not None:
        every += f", and training waits before it is more than {keeping.max_steps_lost} steps ahead of them"
    yield "snapshots", f"{every}; any {plan.tolerate} of the nodes of a coding group may be lost"
    size = max(keeping.group_size or len(plan.nodes), plan.tolerate + 1)
    for line in limits(plan_groups(dict(plan.domains), tolerate=plan.tolerate, group_size=size), dict(plan.domains)):
        yield "limit", line
    budget = _budget(config, plan, atlas)
    for need in budget.values():
        yield "memory", str(need)
    if config.cluster.address == "local":
        total = sum(need.total_bytes for need in budget.values())
        free = ", ".join(f"{pool} {_mib(left)}" for pool, left in sorted(room().items()))
        yield "memory", f"{_mib(total)} in all; free on this machine, which emulates every node: {free}"
        _check_here(budget)
    else:
        yield from _asked(config, plan, rooms or Rooms(refusal="it was not asked"))
        memory_budget.check(budget, (rooms or Rooms()).free)
    yield "memory", "snapshots live in memfds: they count as memory, and the size of /dev/shm is no limit to them"


def _asked(config: Config, plan: Plan, rooms: Rooms) -> Iterator[tuple[str, str]]:
    """What the nodes of a cluster have free, and who could not be asked."""
    later = "; it is asked when the run starts, and what does not fit is refused then"
    if rooms.refusal:
        yield "memory", f"free memory is not known: {rooms.refusal}{later}"
        return
    for node in plan.nodes:
        if node in rooms.free:
            yield "memory", f"{node}: free " + ", ".join(f"{pool} {_mib(left)}" for pool, left in sorted(rooms.free[node].items()))
    for node, why in rooms.silent.items():
        yield "memory", f"{node}: {why}" + (later if node in plan.nodes else "")
    missing = config.cluster.num_nodes - len(rooms.domains)
    if missing > 0:
        yield "memory", f"{len(rooms.domains)} of {config.cluster.num_nodes} nodes could hold {config.cluster.workers_per_node} workers now{later}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if math.isfinite(num_bytes) else "unlimited"
