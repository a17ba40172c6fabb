"""`holdfast train` in a process of its own, for tests that watch or disturb it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework import run_dir
from parallel.native import cache_dir

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = [
    "model=tiny", "data=synthetic", "optim.global_batch=4", "optim.schedule_steps=100", "monitor.progress=plain",
    "monitor.sample_bytes=0",
]  # fmt: skip


def typed(home: Path, *words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """`holdfast` as a person types it who has nothing but an empty directory, from beginning to end."""
    return subprocess.run(
        [sys.executable, "-m", "launch.main", *words],
        cwd=home,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "HOLDFAST_CACHE": str(cache_dir())},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Run:
    """`holdfast train` in a process of its own."""

    def __init__(self, place: Path, *words: str) -> None:
        self.place = place
        self._log = (place.parent / f"{place.name}.log").open("w")
        command = [sys.executable, "-m", "launch.main", "train", *COMMON, f"run_dir={place}", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=place.parent, env=environment, stdout=self._log, stderr=self._log)

    def wait(self, code: int) -> Run:
        """Until it ends, as it should."""
        assert self.process.wait(300) == code, Path(self._log.name).read_text()[-3000:]
        return self

    def until(self, step: int) -> None:
        """Until it has taken a step."""
        self.until_true(lambda: any(row["step"] >= step for row in rows(self.place)))

    def until_saved(self, step: int) -> None:
        """Until it has saved a checkpoint of a step, or of a later one."""
        self.until_true(lambda: any(e["step"] >= step for e in run_dir.events(self.place) if e["kind"] == "checkpoint" and e["saved"]))

    def until_true(self, holds: Callable[[], bool]) -> None:
        """Until something holds, which is asked often."""
        deadline = time.monotonic() + 240
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, Path(self._log.name).read_text()[-3000:]
            time.sleep(0.05)


def rows(place: Path) -> list[dict[str, Any]]:
    return run_dir.metrics(place) if (place / "metrics.jsonl").exists() else []
