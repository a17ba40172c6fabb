"""Matrix: every single node and every pair of four, killed at every phase of a step, from four layouts to what is left.

    python -m benchmarks.matrix runs/matrix          the table from what `holdfast drill matrix into=runs/matrix` has written down

Writes `benchmarks/results/matrix.md` and `matrix.jsonl`. Cells that were not done are shown as such, tries that failed too.

Rule of this file: it reads and words; nothing is run.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

from framework.drills.campaign import read
from framework.drills.matrix import cells, table

LAYOUTS = ("2x2x2", "1x4x2", "2x4x1", "4x2x1")
RESULTS = Path(__file__).resolve().parent / "results"


def main(into: Path) -> None:
    """The results out of a folder of runs."""
    done = read(into / "cells.jsonl")
    held = [row for row in done if row["held"]]
    when = sorted(time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["time"])) for row in done)
    back = sorted(row["back_s"] for row in held)
    lines = [
        "# Every loss at every phase",
        "",
        "Written by `python -m benchmarks.matrix`, from runs of `holdfast drill matrix`: `model=tiny data=synthetic`, 8 workers on 4",
        "emulated nodes, tolerate 2, a snapshot every 2 steps. One run goes through many cells: its nodes are killed (SIGKILL of raylet,",
        "workers and vault) at the phase, the rest trains on under another layout, the nodes come back, are grown onto, and when",
        "any two may be lost again the next ones are killed. Nodes are given by place: place 0 holds rank 0.",
        "",
        "A cell holds if no incident lost more than 2 steps, every sample was used exactly once, and the run it belongs to finished,",
        "left nothing behind, and its losses are within 1e-5, its last state within 1e-4, of a fault-free twin's on one worker.",
        "An entry is the seconds from the kill to the first new step (of both recoveries, where there were two), and the steps lost.",
        "`recovery`: of one node, while a killed worker of its neighbour is being replaced; of two, the second while the first is.",
        "In cells done before 2026-11-26 `encode` and `transfer` struck as soon as the copy began.",
        "",
        f"{len({row['cell'] for row in held})} of {len(LAYOUTS) * len(cells(LAYOUTS[0], nodes=4, most=2))} cells have been done. {when[0]} to {when[-1]} UTC, {platform.machine()}, {os.cpu_count()} cores that did other work at the same time. {len(held)} cells held, "
        f"{len(done) - len(held)} tries did not. Back after {statistics.median(back):.1f} s (median), {back[int(0.95 * (len(back) - 1))]:.1f} s (95 of 100), "
        f"{back[-1]:.1f} s at most; steps lost: " + ", ".join(f"{n} in {sum(r['steps_lost'] == n for r in held)}" for n in sorted({r["steps_lost"] for r in held})) + ".",
        table(done, LAYOUTS, nodes=4, most=2),
        *_failed(done),
    ]  # fmt: skip
    RESULTS.joinpath("matrix.md").write_text("\n".join(lines) + "\n")
    shutil.copy(into / "cells.jsonl", RESULTS / "matrix.jsonl")


def _failed(done: list[dict[str, object]]) -> list[str]:
    """The tries that did not hold, by run, with what was seen: where a run does not hold, none of its cells does."""
    tries: dict[tuple[str, str, str], list[str]] = {}
    for row in done:
        if not row["held"]:
            seen = (str(row["run"]), json.dumps(row["wrong"]), str(row.get("since", "")))
            tries.setdefault(seen, []).append(str(row["cell"]).partition(" ")[2])
    lines = [f"- {run}, {', '.join(found)}: {wrong}" + (f"; since then: {since}" if since else "") for (run, wrong, since), found in tries.items()]
    return ["", "### Tries that did not hold", "", *lines] if lines else []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
