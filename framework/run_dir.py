"""Run directory: what a run leaves behind, for tools, tests, `holdfast report`, and its own next life.

    config.yaml     the composed config                     metrics.jsonl   one object per step
    summary.json    how it ended                            events.jsonl    one object per decision
    logs/  wandb/  drill/  checkpoints/  report.html        run_id          names the run in W&B and in snapshots

A line is written with one `write` to a file opened for appending, so that a killed writer leaves whole lines; a torn
last line, which only a full disk can cause, is cut off when the directory is opened again and skipped by readers.
Files that are replaced are written aside and renamed. NaN and infinity are no JSON, and are written as null.

Rule of this file: bytes and names. It decides nothing, and no field is computed here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

EVENT_KINDS = (
    "plan", "preflight", "crew", "startup", "snapshot", "trouble", "recovered", "resized", "node", "checkpoint", "alarm", "shares", "evaluation",
    "record", "verdict", "finished", "failed",
)  # fmt: skip
METRIC_KEYS = (
    "step", "loss", "grad_norm", "lr", "tokens", "samples", "step_time_s", "tokens_per_s", "generation", "layout",
)  # fmt: skip


def new_run_dir(root: str | Path = "runs") -> str:
    """A name that no other run has, even one that starts in the same second. Nothing is created."""
    return str(Path(root) / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}")


def run_dirs(root: str | Path) -> list[Path]:
    """The runs below `root`, the one that was written to last first."""
    return sorted((path.parent for path in Path(root).glob("*/config.yaml")), key=_changed, reverse=True)


class RunDir:
    """One run's directory, open for writing. Opening makes it, or takes up where a killed writer stopped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.logs = self.path / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._files = {name: _Lines(self.path / name) for name in ("metrics.jsonl", "events.jsonl")}

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunDir:
        """Open the directory of a new run. Raises ValueError if a run is in it already, or it cannot be written."""
        if (Path(path) / "config.yaml").exists():
            raise ValueError(f"run_dir: must be new, got {path}, which holds a run; go on from it with resume={path}")
        try:
            directory = cls(path)
            directory.write_config(config)
        except OSError as error:
            raise ValueError(f"run_dir: must be a place that can be written, got {path} ({error.strerror}); name another one") from error
        return directory

    @property
    def run_id(self) -> str:
        """The run's identity: made once, kept for all its lives."""
        file = self.path / "run_id"
        if not file.exists():
            _replace(file, secrets.token_hex(4))
        return file.read_text().strip()

    @property
    def tracking_id(self) -> str:
        """The run's identity in W&B: that of the run which it continues, else its own.

        Not its identity in snapshots: two runs may continue the same one, side by side.
        """
        file = self.path / "tracking_id"
        return file.read_text().strip() if file.exists() else self.run_id

    def track_as(self, tracking_id: str) -> None:
        """Go on in W&B as the run that this one continues."""
        _replace(self.path / "tracking_id", tracking_id)

    def metric(self, row: Mapping[str, Any]) -> None:
        """Append a step's row. A step that is done again is written again: the last row of a step counts."""
        self._append("metrics.jsonl", row)

    def event(self, kind: str, *, step: int, generation: int, reason: str, **fields: Any) -> dict[str, Any]:
        """Append a decision, stamped with the time, and return it. Raises ValueError for an unknown kind."""
        if kind not in EVENT_KINDS:
            raise ValueError(f"event: kind must be one of {', '.join(EVENT_KINDS)}, got {kind!r}; choose the nearest")
        row = {"time": time.time(), "kind": kind, "step": step, "generation": generation, "reason": reason} | fields
        self._append("events.jsonl", row)
        return row

    @property
    def failure(self) -> str:
        """Why rows wait to be written: a full disk, say; empty while none does. They are, with the first one that can be."""
        return next((lines.failure for lines in self._files.values() if lines.failure), "")

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        _replace(self.path / "config.yaml", yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`. Raises OSError."""
        _replace(self.path / "summary.json", json.dumps(clean(values), indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the files; what was appended is on its way to the disk already."""
        for lines in self._files.values():
            lines.close()
        self._files.clear()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line = json.dumps(clean(row), separators=(", ", ": "), allow_nan=False) + "\n"
        self._files[name].append(line.encode())
        for lines in self._files.values():
            if lines.failure:
                lines.append(b"")


class _Lines:
    """A file of lines, open for appending, with a torn last one cut off. What the disk does not take waits, in order."""

    def __init__(self, file: Path) -> None:
        self._file, self._waiting, self.failure = file, b"", ""
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, min(size, 1 << 20), max(0, size - (1 << 20)))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(self._descriptor, size - len(tail) + tail.rfind(b"\n") + 1)

    def append(self, line: bytes) -> None:
        self._waiting += line
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
            self.failure = ""
        except OSError as error:
            self.failure = f"{self._file}: {error.strerror}"

    def close(self) -> None:
        self.append(b"")
        os.close(self._descriptor)


def metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows that counted, one for each step, ascending."""
    rows: list[dict[str, Any]] = []
    for row in metric_rows(path):
        enter(rows, row)
    return rows


def enter(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a row to those that count so far: a step that is done again takes back those from it on."""
    while rows and rows[-1]["step"] >= row["step"]:
        rows.pop()
    rows.append(row)


def metric_rows(path: str | Path) -> list[dict[str, Any]]:
    """Every row as written, steps that were done again included."""
    return Tail(Path(path) / "metrics.jsonl").new()


def events(path: str | Path) -> list[dict[str, Any]]:
    """Every event, in order."""
    return Tail(Path(path) / "events.jsonl").new()


def summary(path: str | Path) -> dict[str, Any] | None:
    """How the run ended, or None while it goes on, or if it was killed."""
    file = Path(path) / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def give_up(path: str | Path, values: Mapping[str, Any]) -> None:
    """The summary of a run whose controller cannot write one any more; one that it has written stays."""
    file, rows = Path(path) / "summary.json", metrics(path)
    if not file.exists():
        steps = {"steps": rows[-1]["step"], "final_loss": rows[-1]["loss"], "layout": rows[-1]["layout"]} if rows else {"steps": 0}
        _replace(file, json.dumps(clean({**steps, **values}), indent=2, allow_nan=False) + "\n")


def config(path: str | Path) -> dict[str, Any]:
    """The plain config. Raises ValueError if there is no run in this directory."""
    file = Path(path) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path}: must be a run directory, got one without config.yaml; see runs/")
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    return values


def clean(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null, tuples lists, paths and others text."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return clean(value.item()) if hasattr(value, "item") else str(value)


class Tail:
    """The lines of a file of JSON that somebody may be writing; each is read once, and not before it is whole."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0

    def new(self) -> list[dict[str, Any]]:
        """Those that have come since the last time. None while there is no such file."""
        found = []
        with contextlib.suppress(FileNotFoundError), self._file.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if line.strip():
                    found.append(json.loads(line))
        return found


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _changed(path: Path) -> float:
    return max(file.stat().st_mtime for file in path.glob("*.*") if file.is_file())
