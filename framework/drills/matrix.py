"""Matrix: every loss that a run must survive, at every phase of a step, as cells; what one must show; and the table.

    a cell     layout 2x2x2 · the nodes at places 0 and 2 · backward
    its life   steady -> the nodes are killed -> training again on what is left -> they come back -> grown onto -> steady

`recovery` means during another one: a single node dies while a lost worker of its neighbour is being replaced, of a pair the
second while the loss of the first is being recovered from.

Rule of this file: pure. Who kills is `framework/drills/campaign.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from framework.drills.faults import PHASES, Fault

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """Nodes are given by their place in the plan: place 0 holds rank 0."""

    layout: str
    places: tuple[int, ...]
    phase: str

    def __str__(self) -> str:
        return f"{self.layout} {'+'.join(map(str, self.places))} {self.phase}"


def cells(layout: str, *, nodes: int, most: int) -> tuple[Cell, ...]:
    """All cells of a layout, up to `most` nodes at once; those that come first are unlike each other."""
    lost = [places for count in range(1, most + 1) for places in combinations(range(nodes), count)]
    found = [Cell(layout, places, phase) for places in lost for phase in PHASES]
    count, stride = len(found), len(PHASES) + 1  # the next pattern at the next phase
    order = dict.fromkeys((i * stride + i // count) % count for i in range(count * stride))
    return tuple(found[at] for at in order)


def faults(cell: Cell, nodes: Sequence[str], *, ranks_a_node: int, step: int) -> tuple[Fault, ...]:
    """What is to be called for, at `step`, on a crew whose nodes are these, by place."""
    lost = [nodes[place] for place in cell.places]
    if cell.phase != "recovery":
        return tuple(Fault(step, "kill_node", cell.phase, node=node) for node in lost)
    neighbour = (cell.places[0] + 1) % len(nodes)
    first = (
        Fault(step, "kill_worker", "forward", rank=neighbour * ranks_a_node)
        if len(lost) == 1
        else Fault(step, "kill_node", "forward", node=lost[0])
    )
    return (first, *(Fault(step - 1, "kill_node", "recovery", node=node) for node in lost[-1:]))


def steady(events: Sequence[Row], rows: Sequence[Row], *, layout: str, nodes: int, tolerate: int, rest: int = 2) -> tuple[str, ...]:
    """The nodes of the crew by place, when it has had `rest` steps under its own layout on all nodes, and any `tolerate` of
    them may be lost again; else none.
    """
    plan = next((event for event in reversed(events) if event["kind"] == "plan"), None)
    if plan is None or str(plan["layout"]) != layout:
        return ()
    seated = tuple(dict.fromkeys(str(seat).rpartition(".")[0] for seat in plan["seats"]))
    mine = [row for row in rows[-rest:] if row["generation"] == plan["generation"]]
    well = len(seated) == nodes and len(mine) == rest and int(rows[-1]["tolerance"]) >= tolerate
    return seated if well else ()


def wrong(events: Sequence[Row], rows: Sequence[Row], *, since: float, every_steps: int) -> tuple[str, ...]:
    """What does not hold of the rows that counted so far, and of the incidents since a moment."""
    found = []
    following = 0
    for row in rows:
        if row["samples"][0] != following:
            found.append(f"ledger: step {row['step']} begins at sample {row['samples'][0]}, {following} was next")
            break
        following = row["samples"][1] + 1
    incidents = incidents_of(events, since)
    if not any(i["kind"] == "node_loss" for i in incidents):
        found.append(f"no incident of a lost node: {', '.join(str(i['kind']) for i in incidents) or 'none at all'}")
    for incident in incidents:
        if int(incident["steps_lost"]) > every_steps:
            found.append(f"{incident['steps_lost']} steps lost by {incident['kind']}, {every_steps} allowed")
    return tuple(found)


def incidents_of(events: Sequence[Row], since: float) -> list[Row]:
    """The incidents that came to an end since a moment."""
    return [event["incident"] for event in events if "incident" in event and event["time"] >= since]


def left_to_do(all_cells: Sequence[Cell], done: Sequence[Row]) -> list[Cell]:
    """The cells that have not been seen to hold, in order."""
    held = {str(row["cell"]) for row in done if row["held"]}
    return [cell for cell in all_cells if str(cell) not in held]


def table(done: Sequence[Row], layouts: Sequence[str], *, nodes: int, most: int) -> str:
    """The cells of each layout as a table: held, tries that did not, not done; with seconds from the kill to the first new step."""
    lines = []
    for layout in layouts:
        every = cells(layout, nodes=nodes, most=most)
        mine = [row for row in done if row["layout"] == layout]
        held = len(every) - len(left_to_do(every, mine))
        lines += ["", f"### {layout}: {held} of {len(every)} cells hold, {sum(not row['held'] for row in mine)} tries did not", ""]
        lines += ["| lost | " + " | ".join(PHASES) + " |", "| --- " * (len(PHASES) + 1) + "|"]
        for places in dict.fromkeys(cell.places for cell in sorted(every, key=lambda c: (len(c.places), c.places))):
            texts = [_entry([row for row in mine if row["cell"] == str(Cell(layout, places, phase))]) for phase in PHASES]
            lines.append(f"| {' and '.join(map(str, places))} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _entry(tries: Sequence[Row]) -> str:
    if not tries:
        return "–"
    held = [row for row in tries if row["held"]]
    failed = f" ({len(tries) - len(held)} failed)" if len(held) < len(tries) else ""
    return (f"{held[-1]['back_s']:.1f} s, {held[-1]['steps_lost']}" if held else "FAILED") + failed
