"""Plan: every decision that is taken before a crew starts, as one value.

    what lives (places, warm workers) + what is kept (snapshot, checkpoint) + what is asked (config)
        -> layout, seats, coding groups, where the state comes from, and why

Starting, resuming, recovering, shrinking and growing are this one function of different situations. After a loss
the choice is by expected useful work: an option that trains at rate R after a delay d is worth R * (H - d) over the
horizon H (time to the next event), as in Unicron; options within 5% of the best yield to the one that begins sooner.
Every admissible layout of what lives is scored, and the scores are kept in the plan.

Rule of this file: pure. It starts nothing, and everything it decides carries a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from framework.planning.seating import seat_blocks
from parallel.layout import Layout

HYSTERESIS = 0.05
RESTORE_BYTES_S = 1e9  # of state that a node takes in from others, to reckon with
NUM_PRICED = 3  # layouts whose moves are counted: the most useful ones
NUM_KEPT = 64  # scores that a plan keeps


class Refused(RuntimeError):
    """No plan is possible; the message is the run's last word on why and on what is left to do."""


class Unfit(Refused):
    """What the user asked for cannot be had: the message says what must hold."""


class TooFew(Refused):
    """Fewer nodes than `cluster.min_nodes`; some may come back."""


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
    horizon_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the state comes from, and its step: `fresh`, `memory` (the vaults), `durable` (a checkpoint), or `ranks`, which still
    have it, each its own part."""

    tier: str
    step: int
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One way to go on. `useful` is its expected work over the horizon, in steps; `moved_bytes` of state change their
    node for it, None where that was not counted.
    """

    name: str
    layout: Layout
    step_s: float
    delay_s: float
    useful: float
    moved_bytes: int | None = None

    def __str__(self) -> str:
        moved = "" if self.moved_bytes is None else f", {self.moved_bytes / 2**20:.1f} MiB move"
        return f"{self.name} {self.layout}: {self.step_s:.3g} s/step after {self.delay_s:.3g} s, {self.useful:.4g} steps{moved}"


@dataclass(frozen=True, slots=True)
class Situation:
    """All that is known when a plan is made. `overlap(layout, node, ranks)` is what a node holds already."""

    places: tuple[Place, ...]
    generation: int
    source: Source
    predict: Callable[[Layout], float]
    candidates: Callable[[int], Sequence[Layout]]
    overlap: Callable[[Layout, str, range], int] = lambda layout, node, ranks: 0
    needed: Callable[[Layout], int] | None = None  # bytes of state that a layout's ranks need; None: nothing is held yet
    seated: tuple[str, ...] = ()  # the nodes of the plan before
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
        raise TooFew(f"cluster.min_nodes: {wish.min_nodes} nodes must be usable, got {len(places)} ({names})")
    scored = options(wish, situation)
    if not scored:
        slots = sum(p.slots for p in places)
        raise Refused(f"layout: no layout of the model fits the {slots} workers of {len(places)} nodes")
    chosen = choose(scored)
    seats = seats_of(chosen.layout, wish, situation)
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
        options=scored[:NUM_KEPT],
        reason=_reason(chosen, scored, wish, situation, tolerate, len(nodes)),
    )


def held_by_all(told: Mapping[str, tuple[Plan, int]]) -> tuple[Plan, int] | None:
    """The plan all of whose workers hold the state of one step, and that step; `told` is what each worker holds. None: there is none."""
    of = {worker: (plan.generation, step) for worker, (plan, step) in told.items()}
    for plan, step in told.values():
        if all(of.get(seat.worker) == (plan.generation, step) for seat in plan.seats):
            return plan, step
    return None


def stay(plan: Plan, *, generation: int, step: int, trouble: str) -> Plan:
    """The same once more: all ranks live, and go on from what they have themselves."""
    reason = f"{trouble}; as before: layout {plan.layout} on {len(plan.nodes)} nodes; state of step {step} from the ranks themselves"
    return replace(plan, generation=generation + 1, source=Source("ranks", step), options=(), reason=reason)


def options(wish: Wish, situation: Situation) -> tuple[Option, ...]:
    """The admissible ways to go on, most useful first: the layout that was asked for, else all that what lives admits."""
    places = situation.places[: wish.max_nodes]
    slots = sum(p.slots for p in places)
    warm = sum(min(p.warm, p.slots) for p in places)
    asked = [wish.layout] if wish.layout is not None and wish.layout.world <= slots else []
    found = [_option(_way(layout, warm, wish, situation), layout, warm, wish, situation) for layout in asked]
    if not asked:
        found += [_option("use all that lives", c, warm, wish, situation) for c in _ranked(slots, wish, situation)]
    if 0 < warm < slots:
        known = {option.layout for option in found}
        most = warm if wish.layout is None else min(warm, wish.layout.world)  # nobody gets more ranks than were asked for
        fewer = [c for c in _ranked(most, wish, situation) if c not in known]
        found += [_option("use only what is warm", layout, warm, wish, situation) for layout in fewer]
    found.sort(key=lambda option: -option.useful)
    priced = [_priced(option, wish, situation) for option in found[:NUM_PRICED]]
    return tuple(sorted([*priced, *found[NUM_PRICED:]], key=lambda option: -option.useful))


def expected_s(layout: Layout, wish: Wish, situation: Situation) -> float:
    """The step time to reckon with. Where a layout was asked for, nothing with fewer workers is believed to be faster
    per worker than that: whoever asked knows the machines better than a cost model does.
    """
    predicted = situation.predict(layout)
    if wish.layout is None or layout == wish.layout:
        return predicted
    return max(predicted, situation.predict(wish.layout) * wish.layout.world / layout.world)


def choose(scored: Sequence[Option]) -> Option:
    """The most useful option; among those within 5% of it, the one that begins whole seconds sooner."""
    near = [option for option in scored if option.useful >= scored[0].useful * (1 - HYSTERESIS)]
    return min(near, key=lambda option: (round(option.delay_s), -option.useful))


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


def _ranked(slots: int, wish: Wish, situation: Situation) -> list[Layout]:
    """Layouts by expected step time; equals by what is predicted of them alone, then by simplicity."""
    layouts = situation.candidates(slots)
    return sorted(layouts, key=lambda c: (expected_s(c, wish, situation), situation.predict(c), c.pp, c.tp))


def _way(layout: Layout, warm: int, wish: Wish, situation: Situation) -> str:
    """How the layout that was asked for can be had."""
    if not situation.seated or not situation.trouble:
        return "as configured"
    spares = {seat.node for seat in seats_of(layout, wish, situation)} - set(situation.seated)
    if spares:
        return f"use {', '.join(sorted(spares))}"
    return "replace in place" if layout.world > warm else "as configured"


def _option(name: str, layout: Layout, warm: int, wish: Wish, situation: Situation) -> Option:
    step_s = expected_s(layout, wish, situation)
    delay = wish.muster_s + (wish.start_worker_s if layout.world > warm else 0.0)
    return Option(name, layout, step_s, delay, _useful(step_s, delay, wish))


def _priced(option: Option, wish: Wish, situation: Situation) -> Option:
    """The same, with the time it takes to move the state to where it is needed."""
    if situation.needed is None:
        return option
    seats = seats_of(option.layout, wish, situation)
    ranks: dict[str, list[int]] = {}
    for rank, seat in enumerate(seats):
        ranks.setdefault(seat.node, []).append(rank)
    held = sum(situation.overlap(option.layout, node, range(r[0], r[-1] + 1)) for node, r in ranks.items())
    moved = situation.needed(option.layout) - held
    delay = option.delay_s + moved / len(ranks) / RESTORE_BYTES_S
    return replace(option, moved_bytes=moved, delay_s=delay, useful=_useful(option.step_s, delay, wish))


def _useful(step_s: float, delay_s: float, wish: Wish) -> float:
    """Steps over the horizon. The delay counts in whole seconds, more is not known of it."""
    return max(0.0, wish.horizon_s - round(delay_s)) / max(step_s, 1e-9)


def seats_of(layout: Layout, wish: Wish, situation: Situation) -> tuple[Seat, ...]:
    """Where the ranks of a layout sit, so that the fewest bytes move."""
    places = sorted(situation.places[: wish.max_nodes], key=lambda p: -min(p.warm, p.slots))
    spread = -(-layout.world // min(len(places), wish.tolerate + 1))  # on enough nodes that `tolerate` may be lost
    blocks = seat_blocks(
        layout.world,
        [(p.node, min(p.slots, spread)) for p in places],
        lambda node, ranks: situation.overlap(layout, node, ranks),
    )
    return tuple(Seat(node, slot) for node, slot in blocks)


def _reason(chosen: Option, scored: Sequence[Option], wish: Wish, situation: Situation, tolerate: int, num_nodes: int) -> str:
    parts = [situation.trouble] if situation.trouble else []
    parts.append(f"{chosen.name}: layout {chosen.layout} on {num_nodes} nodes")
    if wish.layout is not None and chosen.layout != wish.layout:
        parts.append(f"instead of {wish.layout}, which needs {wish.layout.world} workers")
    others = [option for option in scored if option.layout != chosen.layout]
    if others and situation.trouble:
        parts.append(f"best of {len(scored)} ways, before {others[0].layout}")
    if chosen.moved_bytes is not None:
        parts.append(f"{chosen.moved_bytes / 2**20:.1f} MiB of state change their node")
    source = situation.source
    parts.append("fresh weights" if source.tier == "fresh" else f"state of step {source.step} from {source.tier}")
    if tolerate < wish.tolerate:
        parts.append(f"only {tolerate} losses can be survived with {num_nodes} nodes")
    return "; ".join(parts)
