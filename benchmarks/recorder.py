"""What the record of every collective costs: the recorder's own path, a mark, and a step with real messages.

    python benchmarks/recorder.py
    python benchmarks/recorder.py --write        the table goes to benchmarks/results/recorder.md as well

    own path   one process, torch's fake backend, which does nothing and is done at once: what is left of an operation is
               Python, c10d's dispatch and, on the recorded group, the recorder: issue, note, complete, wait
    a step     two processes on gloo, matrix products and all-reduces

Each is done on a recorded and on a plain group in turns, and the difference of each pair of turns is one sample. The own path
is measured in processor time of its thread, which a busy machine disturbs least; the median and the quartiles over the
pairs tell how sure the figure is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.record import Phase
from parallel.recorder import install

RESULTS = Path(__file__).parent / "results"
PAGE = """# What recording costs

`python benchmarks/recorder.py --write`; cores {cores}, load at the end {load:.1f}. Wanted: under 2 us an operation, under 0.5% of a step.
Medians over pairs of turns, plain and recorded; of the difference the quartiles, too.

```
{table}
```

Own path: torch's fake backend, processor time of the calling thread, so that nothing but the recorder differs. A step of training
has one operation per message and three or four marks.
"""
PAIRS, REPEATS = 201, 1000
Clock = Callable[[], float]
Operation = Callable[[], object]


def seconds_each(operation: Operation, repeats: int, clock: Clock) -> float:
    """Mean seconds of one call out of `repeats`."""
    start = clock()
    for _ in range(repeats):
        operation()
    return (clock() - start) / repeats


def compare(plain: Operation, recorded: Operation, *, pairs: int, repeats: int, clock: Clock) -> tuple[float, float, list[float]]:
    """(median seconds plain, recorded, quartiles of the paired differences)."""
    rows = []
    for pair in range(pairs):
        first, second = (plain, recorded) if pair % 2 == 0 else (recorded, plain)
        took = {first: seconds_each(first, repeats, clock), second: seconds_each(second, repeats, clock)}
        rows.append((took[plain], took[recorded]))
    quartiles = statistics.quantiles([r - p for p, r in rows], n=4)
    return statistics.median(p for p, _ in rows), statistics.median(r for _, r in rows), quartiles


def line(name: str, plain: float, recorded: float, quartiles: list[float]) -> str:
    """A row of the table."""
    low, middle, high = (q * 1e6 for q in quartiles)
    return f"{name:36}{plain * 1e6:11.2f} us{recorded * 1e6:11.2f} us{middle:9.2f} us ({low:.2f} to {high:.2f}) {middle / plain / 1e4:+.2f}%"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=PAIRS)
    options.add_argument("--write", action="store_true")
    chosen = options.parse_args(argv)
    lines = [f"{'':36}{'plain':>14}{'recorded':>14}{'difference (quartiles)':>26}"]
    with tempfile.TemporaryDirectory() as place:
        context = multiprocessing.get_context("spawn")
        said = context.SimpleQueue()
        for work, count in ((_own_path, 1), (_steps, 2)):
            workers = [context.Process(target=work, args=(r, f"{place}/{work.__name__}", chosen.pairs, said)) for r in range(count)]
            for worker in workers:
                worker.start()
            lines += said.get()
            for worker in workers:
                worker.join()
    table = "\n".join(lines)
    print(table)
    if chosen.write:
        (RESULTS / "recorder.md").write_text(PAGE.format(table=table, cores=os.cpu_count(), load=os.getloadavg()[0]))


def _own_path(rank: int, place: str, pairs: int, said: Any) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore", category=FutureWarning)  # names of collectives that torch renames
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    plain, recorded = (dist.new_group([0, 1], backend="cpu:fake") for _ in range(2))
    recorder = install(num_slots=8192)
    cpu = torch.device("cpu")  # the fake backend has the type that recorded ones get elsewhere, so it is wrapped by hand
    wrapped, _ = recorder._extension.wrap(recorded._get_backend(cpu), recorder._ring, 1)
    recorded._register_backend(cpu, dist.ProcessGroup.BackendType.UCC, wrapped)
    one, two = torch.ones(16), torch.ones(32)
    calls: dict[str, Callable[[Any], object]] = {
        "own path: all-reduce": lambda group: dist.all_reduce(one, group=group),
        "own path: all-gather": lambda group: dist.all_gather_into_tensor(two, one, group=group),
        "own path: send and its wait": lambda group: dist.isend(one, 1, group=group).wait(),  # type: ignore[union-attr]
    }
    lines = []
    for name, call in calls.items():
        found = compare(_on(call, plain), _on(call, recorded), pairs=pairs, repeats=REPEATS, clock=time.thread_time)
        lines.append(line(name, *found))
    marks = [seconds_each(lambda: recorder.mark(1, Phase.TRAIN), REPEATS, time.thread_time) for _ in range(pairs)]
    lines.append(f"{'mark':36}{'':14}{statistics.median(marks) * 1e6:11.2f} us")
    said.put(lines)


def _on(call: Callable[[Any], object], group: Any) -> Operation:
    return lambda: call(group)


def _steps(rank: int, place: str, pairs: int, said: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(place, 2), rank=rank, world_size=2)
    plain = dist.new_group([0, 1])
    install(num_slots=8192)
    recorded = dist.new_group([0, 1])
    large, weights = torch.ones(1 << 16), torch.randn(256, 256)

    def step(group: Any) -> None:
        for _ in range(10):
            torch.mm(weights, weights)
            dist.all_reduce(large, group=group)

    dist.barrier(plain)
    found = compare(_on(step, plain), _on(step, recorded), pairs=pairs // 4, repeats=10, clock=time.perf_counter)
    if rank == 0:
        said.put([line("10 x (matmul, 256 KiB all-reduce)", *found)])
    dist.barrier(plain)


if __name__ == "__main__":
    main()
