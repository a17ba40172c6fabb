"""holdfast drill: hurt a small run for real, run its fault-free twin, and check that nothing was lost.

    holdfast drill --list                the named drills, one line each
    holdfast drill node                  run one, or several; `all` for all
    holdfast drill random seed=7         what is killed, when, and under which layout is drawn; runs=5: five seeds from there on
    holdfast drill node model=laptop     with overrides of the config, as for `holdfast train`
    holdfast drill matrix layout=2x2x2   every node and every pair of them killed at every phase of a step, many in one run;
                  steps=600 into=DIR     goes on where the last call ended, with what DIR/cells.jsonl does not have yet

Everything is real: processes, sockets, SIGKILL. Exit code 0 if every invariant held, 1 if one did not.

Rule of this file: it starts runs and prints; what must hold is in `framework/drills/drill.py`.
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from framework import run_dir
from framework.cluster.checkout import code
from framework.drills.campaign import Campaign, read, write
from framework.drills.drill import Check, Drill, Ending, checks, ending
from framework.drills.matrix import cells, left_to_do
from framework.drills.sets import DRILLS, MATRIX, random_drill
from framework.drills.strikes import Striker, left_behind
from parallel.layout import Layout

LIMIT_S = 1200.0
GONE_S = 10.0
NODES, TOLERATE, EVERY = 4, 2, 2  # of the matrix
W = TypeVar("W", Striker, Campaign)


def main(arguments: Sequence[str]) -> int:
    """Run drills. Returns 0, 1 on a violation; raises ValueError for a name that is none."""
    if not arguments or {"-h", "--help", "--list"} & set(arguments):
        print(f"{__doc__}\ndrills:\n" + "".join(f"  {drill.name:<11}{drill.about}\n" for drill in DRILLS))
        return 0
    if "matrix" in arguments:
        return _matrix(arguments)
    chosen = _chosen([word for word in arguments if "=" not in word], _number(arguments, "seed", 0), _number(arguments, "runs", 1))
    overrides = [word for word in arguments if "=" in word and not word.startswith(("seed=", "runs="))]
    root = Path(tempfile.mkdtemp(prefix="drill-", dir=_runs()))
    twins: dict[tuple[str, ...], Path] = {}
    results = [(drill, _run(drill, overrides, root, twins)) for drill in chosen]
    print(_table(results))
    print(f"run directories below {root}")
    return 0 if all(check.held for _, found in results for check in found) else 1


def _chosen(names: Sequence[str], seed: int, runs: int) -> list[Drill]:
    known = {drill.name: drill for drill in DRILLS}
    if unknown := [name for name in names if name not in known and name not in ("all", "random")]:
        near = difflib.get_close_matches(unknown[0], [*known, "all", "random"], n=1, cutoff=0.6)
        advice = f"did you mean holdfast drill {near[0]}?" if near else "see holdfast drill --list"
        raise ValueError(f"holdfast drill {unknown[0]}: no such drill; {advice}")
    found = list(DRILLS) if "all" in names else [known[name] for name in names if name != "random"]
    return found + ([random_drill(number) for number in range(seed, seed + runs)] if "random" in names else [])


def _number(arguments: Sequence[str], key: str, default: int) -> int:
    for word in arguments:
        name, _, value = word.partition("=")
        if name == key:
            if not value.isdigit():
                raise ValueError(f"holdfast drill: {key} must be a whole number, got {value!r}; for example {key}=7")
            return int(value)
    return default


def _run(drill: Drill, overrides: Sequence[str], root: Path, twins: dict[tuple[str, ...], Path]) -> list[Check]:
    """A drill and what must hold. A twin serves all drills that differ from it by their faults alone."""
    run, words = root / drill.name, [*drill.overrides, *overrides]
    faulty = [*words, f"drill.faults=[{', '.join(drill.faults)}]"]
    end = _train(run, faulty, drill)
    found = list(ending(drill, run, end))
    if end.exit_code not in (0, 130) or end.exit_code != drill.exit_code:
        return found
    keeping = run_dir.config(run)["fault_tolerance"]
    if (key := _settings(words)) not in twins:
        twins[key] = root / f"{drill.name}-twin"
        _train(twins[key], words)
    before = None
    if drill.exit_code:
        before, run = run, root / f"{drill.name}-resumed"
        _train(run, [*words, f"resume={before}"])
    every, durable = keeping["every_steps"], keeping["durable"]["every_steps"]
    return found + list(checks(run, twins[key], every_steps=every, durable_steps=durable, drill=drill, before=before))


def _settings(words: Sequence[str]) -> tuple[str, ...]:
    """What the overrides come to: of a key that is given twice the last value counts, and the order of others does not."""
    return tuple(sorted({word.partition("=")[0]: word for word in words}.values()))


def _matrix(arguments: Sequence[str]) -> int:
    """One run through as many cells of a layout as its steps allow. Returns 1 if something did not hold."""
    layout = Layout.parse(_text(arguments, "layout", "2x2x2"))
    root = Path(_text(arguments, "into", "runs/matrix")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    steps, file = _number(arguments, "steps", 600), root / "cells.jsonl"
    todo = left_to_do(cells(str(layout), nodes=NODES, most=TOLERATE), read(file))
    if not todo:
        print(f"matrix: every cell of {layout} holds")
        return 0
    own = ("matrix", "layout=", "into=", "steps=")
    words = [*MATRIX, f"optim.num_steps={steps}", *(word for word in arguments if not word.startswith(own))]
    twin = root / f"twin-{steps}-{code().digest[:6]}"  # of the same program: formats change
    if (run_dir.summary(twin) or {}).get("status") != "finished":
        shutil.rmtree(twin, ignore_errors=True)
        _train(twin, [*words, "cluster.num_nodes=1", "cluster.workers_per_node=1", "layout.pp=1", "layout.dp=1", "layout.tp=1"])
    run = root / f"{layout}-{time.strftime('%H%M%S')}"
    degrees = (f"layout.pp={layout.pp}", f"layout.dp={layout.dp}", f"layout.tp={layout.tp}", f"layout.num_microbatches={layout.pp}", "drill.on_call=true")

    def campaign(driver: int) -> Campaign:
        return Campaign(
            driver, run, todo, nodes=NODES, slots=layout.world // NODES, tolerate=TOLERATE, every_steps=EVERY, num_steps=steps,
            tell=lambda row: print(f"{'held  ' if row['held'] else 'FAILED'} {row['cell']}: {row['cell_s']:.1f} s {'; '.join(row['wrong'])}", flush=True),
        )  # fmt: skip

    end, watch = _follow(run, [*words, f"cluster.workers_per_node={layout.world // NODES}", *degrees], campaign)
    whole = checks(run, twin, every_steps=EVERY)
    complaints = [f"{check.what}: {check.seen}" for check in (*ending(Drill("matrix", "", ()), run, end), *whole) if not check.held]
    for row in watch.found:
        write(file, {**row, "held": row["held"] and not complaints, "wrong": [*row["wrong"], *complaints]})
    if end.exit_code and watch.under_way is not None:
        write(file, {**watch.under_way, "held": False, "wrong": complaints})
    print(f"matrix: {layout}: {len(watch.found)} cells in this run, {len(todo) - len(watch.found)} left; {'; '.join(complaints) or 'the run held'}")
    return int(bool(complaints) or not all(row["held"] for row in watch.found))


def _text(arguments: Sequence[str], key: str, default: str) -> str:
    return next((word.partition("=")[2] for word in arguments if word.startswith(f"{key}=")), default)


def _train(directory: Path, words: Sequence[str], drill: Drill | None = None) -> Ending:
    """A run, and the strikes of a drill on it."""
    return _follow(directory, words, lambda driver: Striker(driver, directory, drill.strikes if drill else ()))[0]


def _follow(directory: Path, words: Sequence[str], watch: Callable[[int], W]) -> tuple[Ending, W]:
    """A run in a process of its own, which this one must be able to do several of, and somebody who sees to it meanwhile."""
    print(f"drill: {directory.name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "launch.main", "train", *words, f"run_dir={directory}"]
    with (directory.parent / f"{directory.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=_checkout())
        with watch(process.pid) as watcher:
            try:
                code = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            finally:
                process.kill()  # a drill that is interrupted leaves no run behind; its cluster ends with it
    return Ending(code, tuple(watcher.hits), _left(watcher.control)), watcher


def _left(control: str | None) -> tuple[str, ...]:
    """What is still there after a moment: processes take one to end."""
    deadline = time.monotonic() + GONE_S
    while control is not None and (found := left_behind(control)):
        if time.monotonic() > deadline:
            return found
        time.sleep(0.2)
    return ()


def _table(results: Sequence[tuple[Drill, Sequence[Check]]]) -> str:
    lines = []
    for drill, found in results:
        verdict = "held" if all(check.held for check in found) else "VIOLATED"
        lines.append(f"{drill.name:<11}{verdict:<10}{drill.about}")
        lines += [f"  {'ok  ' if check.held else 'FAIL'} {check.what:<11}{check.seen}" for check in found]
    return "\n".join(lines)


def _runs() -> Path:
    Path("runs").mkdir(exist_ok=True)
    return Path("runs").resolve()


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent
