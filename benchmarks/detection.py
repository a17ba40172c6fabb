"""Detection, scored: real ranks, randomly drawn injections, clean runs with noise, one table.

    python benchmarks/detection.py                      200 injections and 50 clean runs (about an hour)
    python benchmarks/detection.py --injections 12 --clean 2 --layouts 1x4x1,2x2x1
    python benchmarks/detection.py --out runs.jsonl --count 40       the next 40 of them; the table is of all in the file
    python benchmarks/detection.py --write                           goes on with benchmarks/results/detection.jsonl, and writes
                                                                     the table beside it
    python benchmarks/detection.py --write --seed 2                  the same with another draw; the table is of all draws

All are drawn beforehand, from the seed alone, and shuffled, so that any first part of them is a fair sample.

Every run is a crew of processes on gloo (benchmarks/drilled.py), watched from outside through its rings. Right means:
the first verdict has the class that was injected and names the rank, or the way, and nothing else. A slow way is a shaped
link between network namespaces, confirmed by a pair test where the records name only a group; messages are large there, since
shaping lets the first 32 KB pass at once, and a way that is slow only for what nobody sends is not slow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.drilled import FLAG_END, FLAG_PAIR_TEST, Crew, Injection, Load, crew
from benchmarks.hosts import Hosts, why_not
from fault_tolerance.detection.detector import Detector
from fault_tolerance.detection.pairtest import judge_ways
from fault_tolerance.detection.verdict import NAMES_NOBODY, Kind, Topology, Verdict
from framework import run_dir
from parallel.layout import Layout

KINDS = ("straggler", "sigstop", "gil", "skipped", "killed", "slow_link")
MEANS = {
    "straggler": Kind.SLOW_COMPUTE,
    "sigstop": Kind.HANG,
    "gil": Kind.HANG,
    "skipped": Kind.MISMATCH,
    "killed": Kind.CRASH,
    "slow_link": Kind.SLOW_LINK,
}
SEVERITIES = (1.3, 1.5, 2.0, 3.0, 5.0)
RATES = {2.0: "200mbit", 5.0: "50mbit"}
ONSET_STEPS = (14, 20)
STEPS = 45
LINK_STEPS = 200  # long enough for a pair test in between
LOOK_EVERY_S = 0.2
DRAW = 1000  # a run's number tells its seed: the runs of seed 1 begin here
RESULTS = Path(__file__).parent / "results"
OTHERS = """
## Others, by default

| | killed process | stopped, or holds its lock | skipped collective | straggler, slow way | machine killed | machine cut off |
| --- | --- | --- | --- | --- | --- | --- |
| torchrun (gloo, NCCL) | at once, by its agent | 30 min, 10 min | 30 min, 10 min | never | its agents' keep-alive | as stopped |
| Ray Train 2.60 | 0.05 s *m* | never *m* | torch's | never | 13 s *m*; training again after 77 s *m* | 63 s *m* |
| DeepSpeed | its launcher, at once | torch's | torch's | never | torch's | torch's |

*m*: measured by us, with the defaults, on emulated machines; the rest as documented. Where they notice, none of them names the
rank that others wait for, and the stack of whoever hangs is not kept.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: what was injected, what was said first, how long after it acted, in seconds and steps; its number in the draw."""

    layout: str
    injection: Injection
    kind: str
    ranks: tuple[int, ...]
    right: bool
    seconds: float
    steps: int
    reason: str
    number: int = -1


def scenario(dice: random.Random, layout: Layout, kind: str) -> Injection:
    """A random injection of this kind."""
    rank, step = dice.randrange(layout.world), dice.randrange(*ONSET_STEPS)
    if kind == "straggler":
        return Injection(kind, rank, step, dice.choice(SEVERITIES))
    if kind == "slow_link":
        return Injection(kind, rank, step, dice.choice(list(RATES)), dice.choice(neighbours(layout, rank)))
    return Injection(kind, rank, step)


def neighbours(layout: Layout, rank: int) -> list[int]:
    """The ranks to which training really sends: the next one of its pipeline, and of the rings of dp and tp."""
    seat, out = layout.seat(rank), []
    for axis, degree in enumerate((layout.pp, layout.dp, layout.tp)):
        place = list(seat)
        place[axis] = seat[axis] + 1 if axis == 0 else (seat[axis] + 1) % degree
        if degree > 1 and place[axis] < degree:
            out.append(layout.rank(*place))
    return out or [rank - layout.dp * layout.tp]


def run(layout: Layout, injection: Injection, *, seed: int, verbose: bool = False) -> Outcome:
    """One crew from start to first verdict, or to its end."""
    if injection.kind != "slow_link":
        return _run(layout, injection, seed, None, verbose)
    with Hosts(layout.world) as hosts:
        return _run(layout, injection, seed, hosts, verbose)


def _run(layout: Layout, injection: Injection, seed: int, hosts: Hosts | None, verbose: bool) -> Outcome:
    topology = Topology.one_node_each(layout)
    detector, first, onset_s = Detector(topology), None, None
    load = Load(message_bytes=1 << 20, gradient_bytes=1 << 20, activation_bytes=256 << 10) if hosts else Load()
    with crew(layout, injection, steps=LINK_STEPS if hosts else STEPS, seed=seed, hosts=hosts, load=load) as started:
        end = time.monotonic() + 180
        while first is None and time.monotonic() < end:
            time.sleep(LOOK_EVERY_S)
            if hosts and onset_s is None and detector.step >= injection.step:
                hosts.slow_way(injection.rank, injection.to, RATES[injection.severity])
                hosts.slow_way(injection.to, injection.rank, RATES[injection.severity])
                onset_s = time.monotonic()
            found = detector.observe(started.observed())
            said = started.listen()
            first = next((v for v in found if v.kind not in NAMES_NOBODY), None)
            if verbose and found:
                print("   ", detector.step, *(f"{v.kind}: {v.reason} {v.evidence}" for v in found), sep="\n      ")
            if said.get("ended", 0) == layout.world:
                break
        seen_s, onset_s = time.monotonic(), onset_s or started.listen().get("onset")
        if first is not None and first.kind == Kind.SLOW_LINK and first.link is None:
            first = _pair_tested(started, first, topology)
    right = _right(injection, first)
    return Outcome(
        str(layout),
        injection,
        first.kind if first else "none",
        first.ranks if first else (),
        right,
        seen_s - onset_s if onset_s and first else 0.0,
        detector.step - injection.step if first and injection.kind != "none" else 0,
        first.reason if first else "",
    )


def _pair_tested(started: Crew, suspicion: Verdict, topology: Topology) -> Verdict:
    started.orders.send(FLAG_PAIR_TEST)
    end = time.monotonic() + 60
    while "ways" not in started.listen() and time.monotonic() < end:
        time.sleep(0.1)
    tested = judge_ways(started.said.get("ways", {}), topology, hot=2.0)
    started.orders.send(FLAG_END)
    return replace(tested[0], reason=tested[0].reason + " (pair test)") if tested else suspicion


def _right(injection: Injection, said: Verdict | None) -> bool:
    if injection.kind == "none":
        return said is None
    if said is None or said.kind != MEANS[injection.kind]:
        return False
    if injection.kind == "slow_link":
        return said.link is not None and set(said.link) == {injection.rank, injection.to}
    return said.ranks == (injection.rank,)


def table(outcomes: Sequence[Outcome]) -> str:
    """The scores by kind and severity, and the confusion matrix."""
    rows: dict[tuple[str, float], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        severity = outcome.injection.severity if outcome.injection.kind in ("straggler", "slow_link") else 0.0
        rows[outcome.injection.kind, severity].append(outcome)
    lines = [
        f"{'injected':22}{'runs':>5}{'right':>7}{'share':>7}{'median s':>10}{'max s':>8}{'max steps':>11}"
    ]
    for (kind, severity), found in sorted(rows.items()):
        right = [o for o in found if o.right]
        name = f"{kind} {severity:g}x" if severity else kind
        took = [o.seconds for o in right if o.injection.kind != "none"]
        times = (
            f"{statistics.median(took):10.1f}{max(took):8.1f}{max(o.steps for o in right):11}" if took else f"{'':29}"
        )
        lines.append(
            f"{name:22}{len(found):5}{len(right):7}{len(right) / len(found):7.0%}{times}"
        )
    lines += ["", "confusion: injected (rows) and first verdict (columns)"]
    said = sorted({o.kind for o in outcomes})
    lines.append(f"{'':12}" + "".join(f"{name:>14}" for name in said))
    counts = Counter((o.injection.kind, o.kind) for o in outcomes)
    for kind in sorted({o.injection.kind for o in outcomes}):
        lines.append(f"{kind:12}" + "".join(f"{counts[kind, name]:14}" for name in said))
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], drawn: int) -> str:
    """The results as they are published; `drawn`: the runs of each seed."""
    wrong = [o for o in outcomes if not o.right]
    seeds = sorted({o.number // DRAW for o in outcomes})
    told = "\n".join(
        f"- {o.layout} {o.injection.kind} {o.injection.severity:g}x of rank {o.injection.rank}: {o.kind} {list(o.ranks)}. {o.reason}"
        for o in wrong
    )
    return f"""# Detection

Real processes on gloo, one thing wrong with one of them, read from outside; class and place of the first verdict. {len(outcomes)} of
{drawn * len(seeds)} runs drawn with {" and ".join(f"seed {seed}" for seed in seeds)} (`python benchmarks/detection.py --write` goes on), \
cores {os.cpu_count()}, load at the end {os.getloadavg()[0]:.1f}.
Seconds count from the moment at which the fault acts, steps from the one in which it does. Computation is a sleep here, so that
eight ranks fit on few cores; hangs have the detector's own floor of 5 s, which a run raises to 0.8 of `detect.hang_timeout_s`.

```
{table(outcomes)}
```

{"Wrong:" if wrong else "None was wrong."}
{told}
{OTHERS}"""


def _outcomes(path: Path | None) -> list[Outcome]:
    """What an earlier call has left in its file."""
    rows = run_dir.Tail(path).new() if path is not None else []
    return [Outcome(**{**r, "injection": Injection(**r["injection"]), "ranks": tuple(r["ranks"])}) for r in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, run, score, print."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--injections", type=int, default=200)
    options.add_argument("--clean", type=int, default=50)
    options.add_argument("--layouts", default="1x4x1,2x2x1,2x2x2,1x8x1")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="write every outcome here, one JSON object a line")
    options.add_argument("--count", type=int, help="do no more than so many now")
    options.add_argument("--write", action="store_true", help="keep the runs and the table in benchmarks/results")
    options.add_argument("--verbose", action="store_true")
    chosen = options.parse_args(argv)
    if chosen.write:
        chosen.out = chosen.out or RESULTS / "detection.jsonl"
    kinds = [kind for kind in chosen.kinds.split(",") if kind]
    if "slow_link" in kinds and (reason := why_not()):
        print(f"slow_link left out: {reason}")
        kinds.remove("slow_link")
    layouts = [Layout.parse(text) for text in chosen.layouts.split(",")]
    dice = random.Random(chosen.seed)
    plan = [(layouts[i % len(layouts)], kinds[i // len(layouts) % len(kinds)]) for i in range(chosen.injections)]
    drawn = [(layout, scenario(dice, layout, kind)) for layout, kind in plan]
    drawn += [(layouts[i % len(layouts)], Injection("none")) for i in range(chosen.clean)]
    order = list(enumerate(drawn, DRAW * chosen.seed))
    random.Random(chosen.seed).shuffle(order)
    outcomes = _outcomes(chosen.out)
    done = {outcome.number for outcome in outcomes}
    todo = [run for run in order if run[0] not in done][: chosen.count]
    for number, (layout, injection) in todo:
        outcome = replace(run(layout, injection, seed=number, verbose=chosen.verbose), number=number)
        outcomes.append(outcome)
        mark = "right" if outcome.right else "WRONG"
        print(
            f"{len(outcomes):4}/{len(drawn)} {mark} {layout!s:6} {injection.kind} {injection.severity:g}x rank {injection.rank}"
            f" -> {outcome.kind} {outcome.ranks} after {outcome.seconds:.1f} s, {outcome.steps} steps. {outcome.reason}",
            flush=True,
        )
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    print("\n" + table(outcomes))
    if chosen.write:
        (RESULTS / "detection.md").write_text(page(outcomes, len(drawn)))


if __name__ == "__main__":
    main()
