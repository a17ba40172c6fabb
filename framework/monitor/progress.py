"""Progress: a run as a person sees it, live on a terminal, line by line elsewhere.

    step 120/600  loss 2.341  12.3k tokens/s  mfu 31%  eta 3m10s  layout 2x2x1  generation 1  tolerance 1
    trouble: rank 3 on node1: does not answer since 4.2 s
    recovered: layout 1x3x1 on 3 nodes; state of step 118 from parity

Decisions are printed above, one line each, and stay; the state of the run is one line below, and is replaced.

Rule of this file: text. It is a sink of `telemetry.py`, so that a terminal that blocks does not stop a run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from framework.monitor.telemetry import Entry, Happening, Numbers

PLAIN_EVERY_S = 5.0
QUIET_EVENTS = ("snapshot",)  # too many for a person; the report and the event file have them


def make_progress(kind: str, *, num_steps: int, stream: TextIO | None = None) -> PlainProgress | RichProgress | None:
    """`auto` is `rich` where the stream is a terminal, else `plain`; `off` is None."""
    stream = stream or sys.stderr
    if kind == "auto":
        kind = "rich" if stream.isatty() else "plain"
    if kind == "off":
        return None
    return RichProgress(num_steps, stream) if kind == "rich" else PlainProgress(num_steps, stream)


class Pace:
    """How long the rest takes, from the last steps' times, smoothed."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._step_s: float | None = None

    def eta_s(self, row: Mapping[str, Any]) -> float | None:
        """Seconds to the end after this row, or None before anything is known."""
        took = row.get("step_time_s")
        if isinstance(took, int | float) and took > 0:
            self._step_s = took if self._step_s is None else 0.9 * self._step_s + 0.1 * took
        return None if self._step_s is None else max(0, self._num_steps - row["step"]) * self._step_s


def fields(row: Mapping[str, Any], *, num_steps: int, eta_s: float | None) -> dict[str, str]:
    """What is shown of a row, by title; what is unknown is left out."""
    mfu, rate = row.get("mfu"), row.get("tokens_per_s")
    shown = {
        "step": f"{row['step']}/{num_steps}",
        "loss": _number(row.get("loss"), ".4f"),
        "val": _number(row.get("val_loss"), ".4f"),
        "tokens/s": None if rate is None else short(rate),
        "mfu": None if mfu is None else f"{mfu:.1%}",
        "eta": None if eta_s is None else duration(eta_s),
        "layout": row.get("layout"),
        "generation": _number(row.get("generation"), "d"),
        "tolerance": _number(row.get("tolerance"), "d"),
    }
    return {key: str(value) for key, value in shown.items() if value is not None}


def line(row: Mapping[str, Any]) -> str:
    """An event as one line."""
    return f"{row['kind']}: {row.get('reason', '')}"


def short(value: float) -> str:
    """12345.6 -> 12.3k"""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """190 -> 3m10s"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class PlainProgress:
    """Lines: the first and the last step, one every few seconds in between, and every decision."""

    def __init__(self, num_steps: int, stream: TextIO, *, every_s: float = PLAIN_EVERY_S) -> None:
        self._num_steps, self._stream, self._every_s = num_steps, stream, every_s
        self._pace = Pace(num_steps)
        self._said_at = float("-inf")

    def open(self) -> None:
        """The stream is open."""

    def write(self, entry: Entry) -> None:
        if isinstance(entry, Happening):
            if entry.row["kind"] not in QUIET_EVENTS:
                self._say(line(entry.row))
            return
        eta_s = self._pace.eta_s(entry.row)
        now = time.monotonic()
        if now - self._said_at >= self._every_s or entry.step == self._num_steps:
            self._said_at = now
            shown = fields(entry.row, num_steps=self._num_steps, eta_s=eta_s)
            self._say("  ".join(_phrase(key, value) for key, value in shown.items()))

    def close(self) -> None:
        self._stream.flush()

    def abandon(self) -> None:
        """Nothing is held that would outlive the process."""

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class RichProgress:
    """A bar with the time left, the state of the run below it, and decisions above, on the terminal's last lines."""

    def __init__(self, num_steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._num_steps, self._pace = num_steps, Pace(num_steps)
        self._console = Console(file=stream)
        self._step, self._shown = 0, {"step": f"0/{num_steps}"}
        self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)

    def open(self) -> None:
        self._live.start()

    def write(self, entry: Entry) -> None:
        if isinstance(entry, Numbers):
            self._step = entry.step
            self._shown = fields(entry.row, num_steps=self._num_steps, eta_s=self._pace.eta_s(entry.row))
        elif (kind := str(entry.row["kind"])) not in QUIET_EVENTS:
            from rich.text import Text

            # One print: the live lines are drawn again after each, over what has no end of line yet.
            self._console.print(Text.assemble((kind, _COLOR.get(kind, "cyan")), f": {entry.row.get('reason', '')}"))

    def close(self) -> None:
        self._live.stop()

    def abandon(self) -> None:
        """Nothing is held that would outlive the process."""

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        left = self._shown.get("eta")
        bar.add_row(
            f"step [bold]{self._shown['step']}[/]",
            ProgressBar(total=self._num_steps, completed=self._step),
            f"{left} left" if left else "starting",
        )
        state = [f"[dim]{key}[/] {value}" for key, value in self._shown.items() if key not in ("step", "eta")]
        return Group(bar, Text.from_markup("  ".join(state)))


_COLOR = {"trouble": "bold red", "failed": "bold red", "recovered": "bold green", "finished": "bold green"}
_AFTER: dict[str, Callable[[str], str]] = {"tokens/s": lambda value: f"{value} tokens/s"}


def _phrase(key: str, value: str) -> str:
    return _AFTER[key](value) if key in _AFTER else f"{key} {value}"


def _number(value: Any, form: str) -> str | None:
    return None if value is None else format(value, form)
