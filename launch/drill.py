"""holdfast drill: inject real faults into a small run, run its fault-free twin, and check that nothing was lost.

    holdfast drill                       the named drills, one line each
    holdfast drill node                  run one, or several; `all` for all
    holdfast drill node model=laptop     with overrides of the config, as for `holdfast train`

Everything is real: processes, sockets, SIGKILL. Exit code 0 if every invariant held, 1 if one did not.

Rule of this file: it starts runs and prints; what must hold is in `framework/drills.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from framework import run_dir
from framework.drills import DRILLS, Check, Drill, checks

LIMIT_S = 600.0


def main(arguments: Sequence[str]) -> int:
    """Run drills. Returns 0, 1 on a violation; raises ValueError for a name that is none."""
    if "-h" in arguments or "--help" in arguments or not arguments:
        print(f"{__doc__}\ndrills:\n" + "".join(f"  {drill.name:<10}{drill.about}\n" for drill in DRILLS))
        return 0
    names = [word for word in arguments if "=" not in word]
    known = {drill.name: drill for drill in DRILLS}
    if unknown := [name for name in names if name not in known and name != "all"]:
        raise ValueError(f"holdfast drill {unknown[0]}: no such drill; there are {', '.join(known)} and all")
    chosen = DRILLS if "all" in names else [known[name] for name in names]
    overrides = [word for word in arguments if "=" in word]
    root = Path(tempfile.mkdtemp(prefix="drill-", dir=_runs()))
    twins: dict[tuple[str, ...], Path] = {}
    results = [(drill, _run(drill, overrides, root, twins)) for drill in chosen]
    print(_table(results))
    print(f"run directories below {root}")
    return 0 if all(check.held for _, found in results for check in found) else 1


def _run(drill: Drill, overrides: Sequence[str], root: Path, twins: dict[tuple[str, ...], Path]) -> list[Check]:
    """`twins`: those that have been run, by their overrides; the same one serves every drill that differs in faults only."""
    run, words = root / drill.name, (*drill.overrides, *overrides)
    if words not in twins:
        twins[words] = root / f"{drill.name}-twin"
        _train(twins[words], words)
    twin = twins[words]
    _train(run, [*words, f"drill.faults=[{', '.join(drill.faults)}]"])
    every = run_dir.config(twin)["fault_tolerance"]["every_steps"]
    return list(checks(run, twin, every_steps=every, drill=drill))


def _train(directory: Path, words: Sequence[str]) -> None:
    """A run in a process of its own: this one must be able to do several."""
    print(f"drill: {directory.name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "launch.main", "train", *words, f"run_dir={directory}"]
    with (directory.parent / f"{directory.name}.log").open("w") as log:
        subprocess.run(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=LIMIT_S, check=False, cwd=_checkout()
        )


def _table(results: Sequence[tuple[Drill, Sequence[Check]]]) -> str:
    lines = []
    for drill, found in results:
        verdict = "held" if all(check.held for check in found) else "VIOLATED"
        lines.append(f"{drill.name:<10}{verdict:<10}{drill.about}")
        lines += [f"  {'ok  ' if check.held else 'FAIL'} {check.what:<11}{check.seen}" for check in found]
    return "\n".join(lines)


def _runs() -> Path:
    Path("runs").mkdir(exist_ok=True)
    return Path("runs").resolve()


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent
