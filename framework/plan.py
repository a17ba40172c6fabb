"""Plan: every decision that is taken before a crew starts, as one value.

    what lives (places, warm workers) + what is kept (snapshot, checkpoint) + what is asked (config)
        -> layout, seats, coding groups, where the state comes from, and why

Starting, resuming, recovering, shrinking and growing are this one function of different situations. After a loss
the choice is by expected useful work: an option that trains at rate R after a delay d is worth R * (H - d) over the
horizon H (time to the next event), as in Unicron; options within 5% of the best yield to the least disruptive one.

Rule of this file: pure. It starts nothing, and everything it decides carries a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from framework.seating import seat_blocks
from parallel.layout import Layout

HYSTERESIS = 0.05


class Refused(RuntimeError):
    """No plan is possible; the message is the run's last word on why and on what is left to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """A machine that may be used: its name, how many workers fit, its failure domain, how many live there already."""

    node: str
    slots: int
    domain: str
    warm: int = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank sits: slot `slot` of a node. `worker` names the process, which outlives plans."""

    node: str
    slot: int

    @property
    def worker(self) -> str:
        return f"{self.node}.{self.slot}"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the configuration asks for. `layout` None means: choose. Delays are in seconds."""

    layout: Layout | None
    schedule: str
    num_microbatches: int
    global_batch: int
    num_nodes: int
    min_nodes: int
    max_nodes: int
    tolerate: int
    start_worker_s: float = 8.0
    muster_s: float = 2.0
    repair_s: float = 600.0
    horizon_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the state comes from: `fresh`, `memory` (the vaults) or `durable` (a checkpoint), and its step."""

    tier: str
    step: int
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One way to go on. `useful` is its expected work over the horizon, in steps."""

    name: str
    layout: Layout
    step_s: float
    delay_s: float
    useful: float

    def __str__(self) -> str:
        return f"{self.name} {self.layout}: {self.step_s:.3g} s/step after {self.delay_s:.3g} s, {self.useful:.4g} steps"


@dataclass(frozen=True, slots=True)
class Situation:
    """All that is known when a plan is made. `held_bytes(rank_of_new_layout, node, layout)` prices the seats."""

    places: tuple[Place, ...]
    generation: int
    source: Source
    predict: Callable[[Layout], float]
    candidates: Callable[[int], Sequence[Layout]]
    overlap: Callable[[Layout, str, range], int] = lambda layout, node, ranks: 0
    returning: int = 0  # nodes that may come back
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of one generation."""

    run: str
    generation: int
    layout: Layout
    schedule: str
    num_microbatches: int
    seats: tuple[Seat, ...]
    domains: Mapping[str, str]
    tolerate: int
    source: Source
    options: tuple[Option, ...]
    reason: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that hold a rank, in order of their first rank."""
        return tuple(dict.fromkeys(seat.node for seat in self.seats))

    @property
    def node_of_rank(self) -> tuple[str, ...]:
        """The node of every rank."""
        return tuple(seat.node for seat in self.seats)

    def ranks_on(self, node: str) -> tuple[int, ...]:
        """The ranks that sit on a node, ascending."""
        return tuple(r for r, seat in enumerate(self.seats) if seat.node == node)


def make_plan(run: str, wish: Wish, situation: Situation) -> Plan:
    """Decide everything. Raises Refused when the nodes that are left cannot train, with what would be needed."""
    places = situation.places
    if len(places) < wish.min_nodes:
        names = ", ".join(p.node for p in places) or "none"
        raise Refused(f"cluster.min_nodes: {wish.min_nodes} nodes must be usable, got {len(places)} ({names})")
    scored = options(wish, situation)
    if not scored:
        slots = sum(p.slots for p in places)
        raise Refused(f"layout: no layout of the model fits the {slots} workers of {len(places)} nodes")
    chosen = choose(scored)
    seats = _seats(chosen.layout, wish, situation)
    nodes = {seat.node: next(p.domain for p in places if p.node == seat.node) for seat in seats}
    tolerate = min(wish.tolerate, len(nodes) - 1)
    return Plan(
        run=run,
        generation=situation.generation + 1,
        layout=chosen.layout,
        schedule=wish.schedule,
        num_microbatches=microbatches(chosen.layout, wish),
        seats=seats,
        domains=nodes,
        tolerate=tolerate,
        source=situation.source,
        options=scored,
        reason=_reason(chosen, wish, situation, tolerate, len(nodes)),
    )


def options(wish: Wish, situation: Situation) -> tuple[Option, ...]:
    """The admissible ways to go on, most useful first."""
    places = situation.places[: wish.max_nodes]
    slots = sum(p.slots for p in places)
    warm = sum(min(p.warm, p.slots) for p in places)
    found = [_option("as configured", layout, slots, warm, wish, situation) for layout in _asked(wish, slots)]
    if not found or wish.layout is None:
        best = _fastest(situation.candidates(slots), wish, situation)
        if best is not None:
            found.append(_option("use all that lives", best, slots, warm, wish, situation))
    if 0 < warm < slots:
        best = _fastest(situation.candidates(warm), wish, situation)
        if best is not None:
            found.append(_option("use only what is warm", best, slots, warm, wish, situation))
    return tuple(sorted(found, key=lambda option: -option.useful))


def expected_s(layout: Layout, wish: Wish, situation: Situation) -> float:
    """The step time to reckon with. Where a layout was asked for, nothing with fewer workers is believed to be faster
    per worker than that: whoever asked knows the machines better than a cost model does.
    """
    predicted = situation.predict(layout)
    if wish.layout is None or layout == wish.layout:
        return predicted
    return max(predicted, situation.predict(wish.layout) * wish.layout.world / layout.world)


def choose(scored: Sequence[Option]) -> Option:
    """The most useful option; among those within 5% of it, the one with the shortest delay."""
    near = [option for option in scored if option.useful >= scored[0].useful * (1 - HYSTERESIS)]
    return min(near, key=lambda option: (option.delay_s, -option.useful))


def microbatches(layout: Layout, wish: Wish) -> int:
    """How many microbatches keep their size as configured, so that memory per worker stays what it was.

    A pipeline needs a multiple of its stages' ranks.
    """
    if wish.layout is None or layout == wish.layout:
        count = wish.num_microbatches
    else:
        size = -(-wish.global_batch // (wish.layout.dp * wish.num_microbatches))
        count = -(-wish.global_batch // (layout.dp * size))
    if layout.pp == 1:
        return count
    return -(-count // layout.pp) * layout.pp


def worth_growing(plan: Plan, wish: Wish, situation: Situation) -> Option | None:
    """The option to grow to, when what it gains over the horizon exceeds its cost by the hysteresis; else None."""
    best = next(iter(options(wish, situation)), None)
    if best is None or best.layout.world <= plan.layout.world:
        return None
    now = wish.horizon_s / max(expected_s(plan.layout, wish, situation), 1e-9)
    return best if best.useful > now * (1 + HYSTERESIS) else None


def _asked(wish: Wish, slots: int) -> list[Layout]:
    return [wish.layout] if wish.layout is not None and wish.layout.world <= slots else []


def _fastest(layouts: Sequence[Layout], wish: Wish, situation: Situation) -> Layout | None:
    """The layout with the least expected step time; equals by what is predicted of them alone, then by simplicity."""
    return min(layouts, key=lambda c: (expected_s(c, wish, situation), situation.predict(c), c.pp, c.tp), default=None)


def _option(name: str, layout: Layout, slots: int, warm: int, wish: Wish, situation: Situation) -> Option:
    step_s = expected_s(layout, wish, situation)
    delay = wish.muster_s + (wish.start_worker_s if layout.world > warm else 0.0)
    return Option(name, layout, step_s, delay, max(0.0, wish.horizon_s - delay) / max(step_s, 1e-9))


def _seats(layout: Layout, wish: Wish, situation: Situation) -> tuple[Seat, ...]:
    places = sorted(situation.places[: wish.max_nodes], key=lambda p: -min(p.warm, p.slots))
    spread = -(-layout.world // min(len(places), wish.tolerate + 1))  # on enough nodes that `tolerate` may be lost
    blocks = seat_blocks(
        layout.world,
        [(p.node, min(p.slots, spread)) for p in places],
        lambda node, ranks: situation.overlap(layout, node, ranks),
    )
    return tuple(Seat(node, slot) for node, slot in blocks)


def _reason(chosen: Option, wish: Wish, situation: Situation, tolerate: int, num_nodes: int) -> str:
    parts = [situation.trouble] if situation.trouble else []
    parts.append(f"{chosen.name}: layout {chosen.layout} on {num_nodes} nodes")
    if wish.layout is not None and chosen.layout != wish.layout:
        parts.append(f"instead of {wish.layout}, which needs {wish.layout.world} workers")
    source = situation.source
    parts.append("fresh weights" if source.tier == "fresh" else f"state of step {source.step} from {source.tier}")
    if tolerate < wish.tolerate:
        parts.append(f"only {tolerate} losses can be survived with {num_nodes} nodes")
    return "; ".join(parts)
