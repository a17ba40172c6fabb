"""Sinks: CSV, TensorBoard and Prometheus, and which of all sinks a config asks for.

Rule of this file: each sink is a few lines over its library, which is imported when the sink opens.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from framework.config import MonitorConfig
from framework.monitor.prometheus import Gauge
from framework.monitor.telemetry import Entry, Happening, Numbers, Sink
from framework.monitor.wandb_sink import WandbSink

_COLUMNS = (
    "step", "loss", "val_loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "mfu", "snapshot_stall_ms",
    "generation", "layout",
)  # fmt: skip


def make_sinks(
    monitor: MonitorConfig, *, directory: str | Path, run_id: str, config: Mapping[str, Any], gauge: Callable[[], Gauge]
) -> dict[str, Sink]:
    """The sinks that the config asks for, by name. `gauge` opens whatever keeps Prometheus gauges.

    Raises ValueError when an asked-for library is not installed.
    """
    sinks: dict[str, Sink] = {}
    if monitor.wandb != "disabled":
        sinks["wandb"] = WandbSink(
            directory=directory,
            run_id=run_id,
            mode=monitor.wandb,
            project=monitor.wandb_project,
            name=monitor.wandb_name or Path(directory).name,
            entity=monitor.wandb_entity,
            config=config,
        )
    if monitor.tensorboard:
        sinks["tensorboard"] = TensorBoardSink(Path(directory) / "tensorboard")
    if monitor.csv:
        sinks["csv"] = CsvSink(Path(directory) / "metrics.csv")
    if monitor.prometheus:
        sinks["prometheus"] = GaugeSink(gauge)
    return sinks


class CsvSink:
    """`metrics.csv`: the step's row without its nested values, one line each, for spreadsheets."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._text: TextIO | None = None
        self._writer: Any = None

    def open(self) -> None:
        fresh = not self._file.exists()
        self._text = self._file.open("a", newline="")
        self._writer = csv.DictWriter(self._text, _COLUMNS, extrasaction="ignore", restval="")
        if fresh:
            self._writer.writeheader()

    def write(self, entry: Entry) -> None:
        if isinstance(entry, Numbers) and self._text is not None:
            self._writer.writerow(entry.row)
            self._text.flush()

    def close(self) -> None:
        if self._text is not None:
            self._text.close()

    def abandon(self) -> None:
        """Nothing is held that would outlive the process."""


class TensorBoardSink:
    """Scalars by full name, and decisions as text. Needs the extra `tensorboard`."""

    def __init__(self, directory: Path) -> None:
        import importlib.util

        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "monitor.tensorboard: must have its library, got none; pip install 'holdfast[tensorboard]'"
            )
        self._directory = directory
        self._writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), flush_secs=10)

    def write(self, entry: Entry) -> None:
        if isinstance(entry, Happening):
            text = f"{entry.row['kind']}: {entry.row.get('reason', '')}"
            self._writer.add_text("event", text, global_step=int(entry.row.get("step", 0)))
            return
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, global_step=entry.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        """Nothing is held that would outlive the process."""


class GaugeSink:
    """Prometheus, through whoever keeps the gauges: `train/loss` is set as `holdfast_train_loss`."""

    def __init__(self, gauge: Callable[[], Gauge]) -> None:
        self._make = gauge
        self._gauge: Gauge | None = None
        self._counts: dict[str, int] = {}

    def open(self) -> None:
        self._gauge = self._gauge or self._make()

    def write(self, entry: Entry) -> None:
        assert self._gauge is not None
        if isinstance(entry, Happening):
            kind = str(entry.row["kind"])
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._gauge(f"holdfast_events_{kind}", float(self._counts[kind]))
            return
        self._gauge("holdfast_step", float(entry.step))
        for name, value in entry.values.items():
            self._gauge("holdfast_" + "".join(c if c.isalnum() else "_" for c in name), value)

    def close(self) -> None:
        """Gauges keep their last value."""

    def abandon(self) -> None:
        """Nothing is held that would outlive the process."""
