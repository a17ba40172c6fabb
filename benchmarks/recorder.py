"""What the record of every collective costs: one operation and one step, recorded and plain, interleaved in one run.

    python benchmarks/recorder.py
    python benchmarks/recorder.py --write        the table goes to benchmarks/results/recorder.md as well

Two groups of the same two processes, one made before the recorder was installed and one after, take turns. An operation
is measured in processor time of the process (both its threads), which a busy machine disturbs less than wall time, in a
group of one, where there is no wire; a step in wall time. All figures are medians over the pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.record import Phase
from parallel.recorder import install

RESULTS = Path(__file__).parent / "results"
PAGE = """# What recording costs

Two processes on gloo, the same operations on a recorded and on a plain group in turns, medians of the paired differences; cores {cores},
load at the end {load:.1f}. Wanted: under 2 us an operation, under 0.5% of a step.

```
{table}
```

A step has one or two marks. A negative difference is the noise of the machine.
"""
Clock = Callable[[], float]
Operation = Callable[[], object]


def seconds_each(operation: Operation, repeats: int, clock: Clock) -> float:
    """Mean seconds of one call out of `repeats`."""
    start = clock()
    for _ in range(repeats):
        operation()
    return (clock() - start) / repeats


def compare(plain: Operation, recorded: Operation, *, pairs: int, repeats: int, clock: Clock) -> list[float]:
    """[median seconds plain, median seconds recorded, median of the paired differences]."""
    rows = []
    for pair in range(pairs):
        first, second = (plain, recorded) if pair % 2 == 0 else (recorded, plain)
        took = {first: seconds_each(first, repeats, clock), second: seconds_each(second, repeats, clock)}
        rows.append((took[plain], took[recorded]))
    return [
        statistics.median(p for p, _ in rows),
        statistics.median(r for _, r in rows),
        statistics.median(r - p for p, r in rows),
    ]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=41)
    options.add_argument("--write", action="store_true")
    chosen = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        context = multiprocessing.get_context("spawn")
        said = context.SimpleQueue()
        workers = [context.Process(target=_rank, args=(r, f"{place}/store", chosen.pairs, said)) for r in range(2)]
        for worker in workers:
            worker.start()
        table = said.get()
        for worker in workers:
            worker.join()
    print(table)
    if chosen.write:
        (RESULTS / "recorder.md").write_text(PAGE.format(table=table, cores=os.cpu_count(), load=os.getloadavg()[0]))


def _rank(rank: int, place: str, pairs: int, said: Any) -> None:
    lines: list[str] = []

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(place, 2), rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    both = dist.new_group([0, 1])
    recorder = install(num_slots=8192)
    alone_recorded = [dist.new_group([r]) for r in range(2)][rank]
    both_recorded = dist.new_group([0, 1])
    if rank == 0:
        lines.append(f"{'':34}{'plain':>12}{'recorded':>12}{'difference':>12}")
    dist.barrier(both)
    small, large = torch.ones(1), torch.ones(1 << 16)
    weights = torch.randn(256, 256)

    def step(group: dist.ProcessGroup) -> None:
        for _ in range(10):
            torch.mm(weights, weights)
            dist.all_reduce(large, group=group)

    def operation(group: dist.ProcessGroup) -> Operation:
        return lambda: dist.all_reduce(small, group=group)

    rows: list[tuple[str, Operation, Operation, int, Clock, bool]] = [
        ("all-reduce, processor time", operation(alone), operation(alone_recorded), 500, time.process_time, False),
        (
            "10 x (matmul, 256 KiB all-reduce)",
            lambda: step(both),
            lambda: step(both_recorded),
            10,
            time.perf_counter,
            True,
        ),
    ]
    for name, plain, recorded, repeats, clock, together in rows:
        dist.barrier(both)
        if rank == 0 or together:
            a, b, difference = compare(plain, recorded, pairs=pairs, repeats=repeats, clock=clock)
        if rank == 0:
            lines.append(f"{name:34}{a * 1e6:9.2f} us{b * 1e6:9.2f} us{difference * 1e6:9.2f} us  {difference / a:+.2%}")
    if rank == 0:
        marked = seconds_each(lambda: recorder.mark(1, Phase.TRAIN), 100_000, time.process_time)
        lines.append(f"{'mark':34}{'':12}{marked * 1e6:9.2f} us")
        said.put("\n".join(lines))
    dist.barrier(both)


if __name__ == "__main__":
    main()
