"""Encode and repair rates of the erasure code on one core, against what bounds it and what others offer.

    memcpy       copying the k data blocks once, in the same round: the limit that memory sets
    C            the same ISA-L routine, matrix and buffers, called and timed inside a C function (needs gcc)
    holdfast     fault_tolerance.coding.codec.Codec, from Python
    pyeclib      pyeclib's own API over the same ISA-L
    tables       multiplication tables in numpy, one look-up per byte, as zfec does it in C

Seconds are those of the one thread on its core, so that being preempted does not count. Every round measures all of
them, one after the other in a random order; figures are medians over rounds, and ratios are medians of the ratios
within rounds. A rate is k blocks of data per second, whatever the number of blocks made. "repair" loses m data blocks
and makes them again; "repair one" loses one.

    python -m benchmarks.erasure [--rounds 15] [--block-mib 16]

It writes `benchmarks/results/erasure.json` and `.md`, with the cells that miss their goal marked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.coding import gf256, isal
from fault_tolerance.coding.codec import Codec

RESULTS = Path(__file__).parent / "results"
CODES = ((4, 1), (4, 2), (8, 2), (6, 3))
PEERS = ("memcpy", "C", "holdfast", "pyeclib", "tables")
GOAL_MEMCPY, GOAL_C = 1.0, 0.9
_SLOW_SHARE = 8  # the numpy tables get an eighth of the bytes; their rate does not depend on it
_LOOKUP_BYTES = 1 << 16
_ROWS = ctypes.c_void_p
_DRIVER = r"""
#include <time.h>
typedef void (*encode_fn)(int, int, int, unsigned char *, unsigned char **, unsigned char **);
typedef int (*xor_fn)(int, int, void **);
static double now(void)
{ struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
double time_encode(encode_fn f, int len, int k, int rows, unsigned char *tables, unsigned char **in,
                   unsigned char **out)
{ double start = now(); f(len, k, rows, tables, in, out); return now() - start; }
double time_xor(xor_fn f, int vectors, int len, void **all)
{ double start = now(); f(vectors, len, all); return now() - start; }
"""

Blocks = list[NDArray[np.uint8]]
Timer = Callable[[], float]


def aligned(count: int, length: int) -> Blocks:
    """Blocks that start at multiples of 64 bytes, as shared memory does, with every page touched."""
    store = np.zeros(count * length + 64, np.uint8)
    first = -store.ctypes.data % 64
    return [store[first + i * length :][:length] for i in range(count)]


def timed(work: Callable[[], object]) -> Timer:
    """Seconds of this thread in one call, seen from Python."""

    def measure() -> float:
        start = time.thread_time()
        work()
        return time.thread_time() - start

    return measure


def copy(sources: Blocks, outputs: Blocks) -> None:
    """What memory allows at best."""
    for source, output in zip(sources, outputs, strict=True):
        np.copyto(output, source)


def compile_driver(folder: str) -> ctypes.CDLL | None:
    """The C timer, or None without gcc."""
    if shutil.which("gcc") is None:
        return None
    source, binary = Path(folder, "driver.c"), Path(folder, "driver.so")
    source.write_text(_DRIVER)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(binary), str(source)], check=True)
    driver = ctypes.CDLL(str(binary))
    driver.time_encode.restype = driver.time_xor.restype = ctypes.c_double
    return driver


def from_c(driver: ctypes.CDLL, library: isal.Isal, matrix: gf256.Bytes, sources: Blocks, outputs: Blocks) -> Timer:
    """ISA-L timed inside C: `xor_gen` where a plain XOR is asked for, else `ec_encode_data`."""
    lib = ctypes.CDLL(library.path)
    length, k, rows = len(sources[0]), len(sources), len(outputs)
    everything = (_ROWS * (k + rows))(*[block.ctypes.data for block in (*sources, *outputs)])
    if rows == 1 and bool((matrix == 1).all()):
        return lambda: float(driver.time_xor(lib.xor_gen, k + 1, length, everything))
    tables = ctypes.create_string_buffer(32 * k * rows)
    lib.ec_init_tables(k, rows, matrix.tobytes(), tables)
    ins, outs = (_ROWS * k)(*everything[:k]), (_ROWS * rows)(*everything[k:])
    return lambda: float(driver.time_encode(lib.ec_encode_data, length, k, rows, tables, ins, outs))


def by_tables(matrix: gf256.Bytes, sources: Blocks, outputs: Blocks) -> None:
    """out ^= TABLE[coefficient][source], in slices that fit the cache."""
    spare = np.empty(_LOOKUP_BYTES, np.uint8)
    for start in range(0, len(sources[0]), _LOOKUP_BYTES):
        cut = slice(start, start + _LOOKUP_BYTES)
        for row, output in zip(matrix, outputs, strict=True):
            output[cut] = 0
            for coefficient, source in zip(row, sources, strict=True):
                part = source[cut]
                np.take(gf256.MUL[coefficient], part, out=spare[: len(part)], mode="clip")
                np.bitwise_xor(output[cut], spare[: len(part)], out=output[cut])


def peers(k: int, m: int, losses: int, length: int, driver: ctypes.CDLL | None) -> dict[str, Timer]:
    """A timer per peer for one cell: encoding if `losses` is 0, else the repair of that many data blocks."""
    blocks, made, copies = aligned(k + m, length), aligned(max(m, losses), length), aligned(k, length)
    source_of_bytes = np.random.default_rng(0)
    for block in blocks[:k]:
        block[:] = source_of_bytes.integers(0, 256, length, np.uint8)
    codec = Codec(k, m)
    codec.encode(blocks[:k], blocks[k:])
    if losses:
        chosen, matrix = gf256.recovery(k, m, range(losses, k + m), range(losses))
        sources, outputs = [blocks[i] for i in chosen], made[:losses]
        present, wanted = {i: blocks[i] for i in chosen}, dict(enumerate(outputs))
        ours = timed(lambda: codec.decode(present, wanted))
    else:
        matrix, sources, outputs = gf256.generator(k, m), blocks[:k], made[:m]
        ours = timed(lambda: codec.encode(sources, outputs))
    small = [block[: length // _SLOW_SHARE] for block in sources]
    small_out = [block[: length // _SLOW_SHARE] for block in aligned(len(outputs), length)]
    slow = timed(lambda: by_tables(matrix, small, small_out))
    found = {
        "memcpy": timed(lambda: copy(blocks[:k], copies)),
        "holdfast": ours,
        "tables": lambda: slow() * _SLOW_SHARE,
    }
    library = isal.load()[0]
    if driver is not None and library is not None:
        found["C"] = from_c(driver, library, matrix, sources, outputs)
    pyeclib = by_pyeclib(k, m, losses, b"".join(block.tobytes() for block in blocks[:k]))
    return found | ({"pyeclib": pyeclib} if pyeclib is not None else {})


def by_pyeclib(k: int, m: int, losses: int, data: bytes) -> Timer | None:
    """pyeclib's `encode` or `reconstruct`, or None where it is not installed."""
    try:
        from pyeclib.ec_iface import ECDriver  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    driver = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy")
    if not losses:
        return timed(lambda: driver.encode(data))
    left = driver.encode(data)[losses:]
    return timed(lambda: driver.reconstruct(left, list(range(losses))))


def measure(timers: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds of every peer in every round, in a new order each time; the first round warms up and does not count."""
    names = [name for name in PEERS if name in timers]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(names, len(names)):
            took = timers[name]()
            if turn:
                seconds[name].append(took)
    return seconds


def cell(k: int, m: int, operation: str, length: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """One row of the result: median rates, and median ratios within rounds."""
    rates = {name: k * length / statistics.median(times) / 1e9 for name, times in seconds.items()}

    def ratio(name: str, other: str) -> float | None:
        if name not in seconds or other not in seconds:
            return None
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    to_memcpy = {name: ratio(name, "memcpy") for name in seconds}
    to_c = ratio("holdfast", "C")
    missed = []
    if m <= 2 and (to_memcpy["holdfast"] or 0) < GOAL_MEMCPY:
        missed.append(f"below {GOAL_MEMCPY} x memcpy")
    if to_c is not None and to_c < GOAL_C:
        missed.append(f"below {GOAL_C} x C")
    return {
        "k": k, "m": m, "operation": operation, "missed": missed,
        "gb_per_s": rates, "to_memcpy": to_memcpy, "to_c": to_c,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to memcpy, in Markdown."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"

    head = ["(k, m)", "operation", "memcpy GB/s", *(f"{p} x" for p in PEERS[1:]), "holdfast / C", "goal"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [f"({row['k']}, {row['m']})", row["operation"], f"{row['gb_per_s']['memcpy']:.1f}"]
        cells += [number(row["to_memcpy"].get(peer)) for peer in PEERS[1:]]
        goal = f"**{', '.join(row['missed'])}**" if row["missed"] else "met"
        lines.append(f"| {' | '.join([*cells, number(row['to_c']), goal])} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "codec": isal.load()[1].rsplit("/", 1)[-1],
    }


def run(rounds: int, length: int) -> Iterator[dict[str, Any]]:
    """Every cell of the table."""
    with tempfile.TemporaryDirectory() as folder:
        driver = compile_driver(folder)
        for k, m in CODES:
            repairs = {1: "repair one"} | ({m: "repair"} if m > 1 else {})
            for losses, operation in {0: "encode", **repairs}.items():
                yield cell(k, m, operation, length, measure(peers(k, m, losses, length, driver), rounds))


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block-mib", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = list(run(max(options.rounds, 5), options.block_mib << 20))
    found = {"machine": machine(), "rounds": max(options.rounds, 5), "block_mib": options.block_mib, "cells": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "erasure.json").write_text(json.dumps(found, indent=1) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    text = (
        f"# Erasure code, one core: ratios to memcpy\n\nBlocks of {options.block_mib} MiB, medians of {found['rounds']} "
        f"interleaved rounds of thread time; {where}.\n\n{table(rows)}\n\nColumns marked x are rates of data as "
        f"multiples of memcpy's in the same round (higher is better). Goal: at least {GOAL_MEMCPY} for m <= 2, and "
        f"{GOAL_C} of C.\n"
    )
    (options.out / "erasure.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
