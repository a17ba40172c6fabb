"""Another layout, out of memory: restoring from vaults against saving and loading through a file system.

    before    1x4x1, four ranks on four nodes, whose vaults hold the state (RS over four, one may be lost)
    after     1x2x1, two ranks, which hold other boxes

    holdfast      the boxes each rank needs, out of its node's vault, of its peers', or decoded; every chunk hashed,
                  the state digested at the end
    dcp           dcp.save on the four, dcp.load on the two
    deepspeed     save_checkpoint on the four, ds_to_universal, load_checkpoint on the two

All of one run on one machine, interleaved (`checkpoint.py` measures both sides). Engines and groups exist already in
every case; files stay in the page cache, which is the best case for those that use files.

    python -m benchmarks.relayout [--presets 100m] [--rounds 3] [--folder DIR]

It writes `benchmarks/results/relayout.json` and `.md`, with the goals that are missed marked.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from fault_tolerance.coding.placement import plan_groups
from fault_tolerance.snapshots.catalogue import catalogue
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault_client import VaultClient
from parallel.atlas import Atlas

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NODES = ("n0", "n1", "n2", "n3")
LOST = "n3"


class Vaults:
    """Four vaults of a run, each a process."""

    def __init__(self, atlas: Atlas) -> None:
        self.secret, self._run = secrets.token_hex(16), "relayout" + secrets.token_hex(4)
        self._processes = {node: self._start(node) for node in NODES}
        addresses = {node: json.loads(p.stdout.readline())["address"] for node, p in self._processes.items()}  # type: ignore[union-attr]
        key = bytes.fromhex(self.secret)
        self._clients = {node: VaultClient(a, run=self._run, secret=key) for node, a in addresses.items()}
        self.plan = SnapshotPlan(
            run=self._run,
            generation=1,
            atlas=atlas,
            seats=NODES,
            groups=plan_groups(dict.fromkeys(NODES), tolerate=1, group_size=len(NODES)),
            addresses=addresses,
        )
        for client in self._clients.values():
            client.open(self.plan)

    def __enter__(self) -> Vaults:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def before(self) -> dict[str, Any]:
        """What the ranks that stage must know."""
        return {"secret": self.secret, "plan": self.plan.to_json()}

    def after(self) -> dict[str, Any]:
        """What the ranks that restore must know: the newest snapshot, and what is left of it without a node."""
        kept = {node: client.inventory() for node, client in self._clients.items()}
        left = [inventory for node, inventory in kept.items() if node != LOST]
        found = [catalogue(inventories, run=self._run).newest for inventories in (list(kept.values()), left)]
        assert found[0] is not None and found[1] is not None, "one loss is tolerated"
        return {
            "secret": self.secret,
            "nodes": [NODES[0], NODES[2]],
            "snapshot": found[0].to_json(),
            "snapshot_lost": found[1].to_json(),
        }

    def _start(self, node: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fault_tolerance.snapshots.vault", "--node", node, "--run", self._run]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(self.secret + "\n")
        process.stdin.flush()
        return process


def write(report: dict[str, Any]) -> str:
    """Write the results of presets that `checkpoint.measure` measured with vaults; returns the text."""
    RESULTS.mkdir(exist_ok=True)
    kept = {name: _figures(found) for name, found in report["presets"].items()}
    (RESULTS / "relayout.json").write_text(json.dumps(report | {"presets": kept}, indent=2) + "\n")
    text = _markdown(report, kept)
    (RESULTS / "relayout.md").write_text(text)
    return text


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds, medians: of each part, and of the whole way from one layout to the other."""

    def median(what: str, way: str) -> float:
        return statistics.median(row["seconds"] for row in found["rows"] if (row["what"], row["way"]) == (what, way))

    convert = statistics.median(found["convert"]) if found["convert"] else 0.0
    figures = {
        "bytes": found["needed"],
        "holdfast": {"restore": median("load other", "vaults")},
        "holdfast, a node lost": {"restore": median("load other", "vaults, a node lost")},
        "dcp": {"save": median("save", "dcp.save"), "load": median("load other", "dcp.save")},
    }
    if convert:
        parts = {"save": median("save", "deepspeed"), "convert": convert, "load": median("load other", "deepspeed")}
        figures["deepspeed"] = parts
    return figures


def _markdown(report: dict[str, Any], kept: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# From one layout to another",
        "",
        f"Seconds, medians of {report['rounds']} interleaved rounds; {machine}.",
        "The state of four ranks (1x4x1) comes to two (1x2x1). holdfast's is in the vaults' memory already and is verified;",
        "the others' goes through files, which are in the page cache.",
    ]
    for preset, figures in kept.items():
        totals = {way: sum(parts.values()) for way, parts in figures.items() if way != "bytes"}
        lines += ["", f"## {preset}: {figures['bytes'] / 1e6:.0f} MB of state", "", "| | parts | in all |", "| --- | --- | --- |"]
        for way, total in totals.items():
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in figures[way].items())
            lines.append(f"| {way} | {parts} | {total:.3f} |")
        lines += ["", *_goals(totals)]
    return "\n".join(lines) + "\n"


def _goals(totals: dict[str, float]) -> list[str]:
    rows = [("at least 3x faster than DCP", "dcp", 3.0), ("at least 10x faster than the universal route", "deepspeed", 10.0)]
    ratios = [(text, totals[way] / totals["holdfast"], goal) for text, way, goal in rows if way in totals]
    return [f"- {text}: {ratio:.1f}x, {'met' if ratio >= goal else '**missed**'}" for text, ratio, goal in ratios]


if __name__ == "__main__":
    from benchmarks import checkpoint

    checkpoint.main(default_presets=("100m",), reports=("relayout",))
