"""Startup: where the seconds between the command and the first step went.

    command -> config -> cluster (warden, ray, gcs, raylets) -> connect -> controller -> plan, processes -> build -> first step
    \\_______ the driver's own, measured there _______/  \\________ the controller's, measured there ________/

Rule of this file: it adds up and words. Who starts what measures it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil


def command_began() -> float:
    """When this process was started, in seconds since the epoch."""
    return float(psutil.Process().create_time())


class Startup:
    """The parts of a start, in seconds, in the order in which they end. They add up to the time since `began`."""

    def __init__(self, began: float, parts: Mapping[str, float] | None = None) -> None:
        """`began` (epoch) is when the command was given; `parts` what another process has measured of it so far."""
        self._began = began
        self.parts: dict[str, float] = dict(parts or {})

    def mark(self, part: str) -> None:
        """All the time that no part has yet belongs to this one."""
        self.parts[part] = max(0.0, time.time() - self._began - self.total_s)

    def divide(self, part: str, inner: Mapping[str, float]) -> None:
        """Replace a part by what it consists of; what its own parts leave over stays under its name."""
        whole = self.parts.pop(part)
        known = {name: seconds for name, seconds in inner.items() if seconds > 0}
        self.parts[part] = max(0.0, whole - sum(known.values()))
        self.parts |= known

    def plain(self) -> dict[str, Any]:
        """Keyword arguments that make it again, in another process."""
        return {"began": self._began, "parts": dict(self.parts)}

    @property
    def total_s(self) -> float:
        """From the command to the end of the last part."""
        return sum(self.parts.values())

    def words(self) -> str:
        """For a person: `7.9 s from the command to the first step: config 0.9, ...`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items() if seconds >= 0.05)
        return f"{self.total_s:.1f} s from the command to the first step: {parts}"
