"""Durable checkpoints against torch.save, DCP and DeepSpeed's universal route: stall, durable, load, bytes read.

    save          1x4x1: four ranks, every way once in a round, each round starting with another one; always into an empty
                  folder, the disk having nothing else to do
    load same     the same four ranks
    load other    1x2x1: two ranks, which hold other boxes. DeepSpeed converts in between (ds_to_universal)
    vaults        the same out of the nodes' memory; what that is against the others is said by `relayout.py`

"stall" is what the step waits for, "durable" the time until all is on disk, fsynced and visible. Seconds are those of
the slowest rank, medians over rounds; holdfast's loads verify every byte, the others' verify none. Files are in the
page cache for all. Bytes read come from /proc/self/io. DeepSpeed's load other is its conversion plus its load.

    python -m benchmarks.checkpoint [--presets 20m 100m] [--rounds 5] [--folder DIR] [--no-deepspeed]

It writes `benchmarks/results/checkpoint.json` and `.md`, and `relayout.json` and `.md`, with the goals that are
missed marked.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import relayout
from framework.model import Decoder
from parallel.assemble import meta
from parallel.atlas import Atlas
from parallel.layout import Layout
from parallel.specs import state_specs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
WAYS = ("holdfast", "torch.save", "dcp.save", "dcp.async_save", "deepspeed")
VOCAB = 259
CONVERT = """
import sys, time
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
args = parse_arguments()
start = time.perf_counter()
main(args)
print("seconds", time.perf_counter() - start)
"""


def main(*, default_presets: tuple[str, ...] = ("20m", "100m"), reports: tuple[str, ...] = ("checkpoint", "relayout")) -> None:
    """Measure, print, and write the results; a report that was asked for only."""
    options = _options(default_presets)
    found = {preset: _preset(preset, options) for preset in options.presets}
    report = {"machine": _machine(), "rounds": options.rounds, "presets": found}
    RESULTS.mkdir(exist_ok=True)
    if "checkpoint" in reports:
        (RESULTS / "checkpoint.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "checkpoint.md").write_text(_markdown(report))
        print(_markdown(report))
    if "relayout" in reports:
        print(relayout.write(report))


def _options(default_presets: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(default_presets))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary directory")
    parser.add_argument("--no-deepspeed", dest="deepspeed", action="store_false")
    return parser.parse_args()


def _preset(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """All ways on one preset."""
    values = yaml.safe_load((ROOT / "configs" / "model" / f"{preset}.yaml").read_text())
    model = {key: value for key, value in values.items() if not key.startswith("_")} | {"vocab_size": VOCAB}
    whole = meta(functools.partial(Decoder, **model))
    atlas = Atlas(state_specs(whole), Layout.parse("1x4x1"), "1f1b", model["num_layers"])
    with tempfile.TemporaryDirectory(dir=options.folder) as name, relayout.Vaults(atlas) as vaults:
        job = {"model": model, "folder": name, "rounds": options.rounds, "deepspeed": options.deepspeed}
        same = _ranks(4, job | {"phase": "same", "layout": "1x4x1", "vaults": vaults.before()})
        convert = [_convert(Path(name)) for _ in range(options.rounds)] if options.deepspeed else []
        other = _ranks(2, job | {"phase": "other", "layout": "1x2x1", "vaults": vaults.after()})
        return {"rows": same["rows"] + other["rows"], "convert": convert, "needed": other["needed"]}


def _ranks(world: int, job: dict[str, Any]) -> dict[str, Any]:
    """Run the ranks to their end. Raises RuntimeError with the output of one that failed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder = Path(job["folder"])
    job = job | {"out": str(folder / f"{job['phase']}.json")}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (folder / f"{job['phase']}-job.json").write_text(json.dumps(job))
    logs = [folder / f"{job['phase']}-{rank}.log" for rank in range(world)]
    command = [sys.executable, str(Path(__file__).with_name("checkpoint_rank.py"))]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(folder / f"{job['phase']}-job.json")],
            env=environment,
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.2)
        failed = [i for i, rank in enumerate(ranks) if rank.poll()]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if failed:
        raise RuntimeError(logs[failed[0]].read_text()[-3000:])
    found: dict[str, Any] = json.loads(Path(job["out"]).read_text())
    return found


def _convert(folder: Path) -> float:
    """Seconds of ds_to_universal, its imports not counted."""
    shutil.rmtree(folder / "universal", ignore_errors=True)
    places = ["--input_folder", str(folder / "deepspeed" / "step")]
    places += ["--output_folder", str(folder / "universal" / "step_universal")]
    more = ["--inject_missing_state", "--num_extract_workers", "2", "--num_merge_workers", "2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = folder / "convert.py"  # a file, as its worker processes import it again
    script.write_text(f"if __name__ == '__main__':\n{''.join(f'    {line}{chr(10)}' for line in CONVERT.splitlines())}")
    done = subprocess.run([sys.executable, script, *places, *more], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return float(done.stdout.rsplit("seconds", 1)[1])


def _machine() -> dict[str, Any]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cores": os.cpu_count(), "load": os.getloadavg()[0], **versions}


def _median(rows: list[dict[str, Any]], what: str, way: str, key: str) -> float | None:
    values = [row[key] for row in rows if row["what"] == what and row["way"] == way]
    return statistics.median(values) if values else None


def _markdown(report: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# Durable checkpoints",
        "",
        f"Seconds, medians of {report['rounds']} interleaved rounds; {machine}.",
        "Saved by four ranks (1x4x1); loaded by the same four, and by two (1x2x1). holdfast verifies every byte it loads.",
        "Read: bytes that loading on the two ranks took, as a multiple of the bytes they needed.",
    ]
    for preset, found in report["presets"].items():
        lines += ["", f"## {preset}: {found['needed'] / 1e6:.0f} MB of state", "", *_table(found), "", *_goals(found)]
    return "\n".join(lines) + "\n"


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| | save: stall | save: durable | load same | load other | read |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        cells = _cells(found, way)
        if any(cell is not None for cell in cells):
            lines.append(f"| {way} | " + " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return lines


def _cells(found: dict[str, Any], way: str) -> tuple[float | None, ...]:
    rows = found["rows"]
    other, read = _median(rows, "load other", way, "seconds"), _median(rows, "load other", way, "read")
    if way == "deepspeed" and other is not None:
        other += statistics.median(found["convert"])
    stall, durable = _median(rows, "save", way, "stall"), _median(rows, "save", way, "seconds")
    same = _median(rows, "load same", way, "seconds")
    return stall, durable, same, other, None if read is None else read / found["needed"]


def _goals(found: dict[str, Any]) -> list[str]:
    """The goals, met or missed, with their figures."""
    ours, dcp, deepspeed = (_cells(found, way) for way in ("holdfast", "dcp.save", "deepspeed"))
    asynchronous = _cells(found, "dcp.async_save")
    rows = [("load other at least 2x faster than DCP", _ratio(dcp[3], ours[3]), 2.0)]
    rows += [("load other at least 10x faster than the universal route", _ratio(deepspeed[3], ours[3]), 10.0)]
    rows += [("stall no longer than DCP's asynchronous one", _ratio(asynchronous[0], ours[0]), 1.0)]
    rows += [("stall no longer than a snapshot's copy into its vault", _ratio(_median(found["rows"], "save", "vaults", "stall"), ours[0]), 0.8)]
    lines = [
        f"- {text}: {ratio:.1f}x, {'met' if ratio >= goal else '**missed**'}" for text, ratio, goal in rows if ratio
    ]
    read = ours[4] or 0.0
    return [*lines, f"- bytes read within 2% of bytes needed: {read:.4f}, {'met' if read <= 1.02 else '**missed**'}"]


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


if __name__ == "__main__":
    main()
