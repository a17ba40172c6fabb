"""Log watch: what the ranks of a crew write, followed while they run, and the line that is likely the cause of a trouble.

    logs/g001_r003_n1.1.log ... --poll--> lines with the time of the file --> older than a minute: what healthy times say
                                                                          --> since then, at a trouble: likely_causes

Only logs that this machine can read are followed. A line that merely says that a collective broke is an effect of
somebody else's end, and never named.

Rule of this file: it reads files; how lines are judged is `fault_tolerance/detection/log_cause.py`'s.
"""

from __future__ import annotations

from pathlib import Path

from fault_tolerance.detection.log_cause import Background, Line, likely_causes, messages
from framework.plan import Plan

WINDOW_S = 60.0
MOST_BYTES = 1 << 20  # of one log and look: who writes more than that is not read whole
EFFECTS = (
    "Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "imed out", "operation was aborted",
    "DistBackendError", "DistNetworkError", "DistStoreError", "Warning",
)  # fmt: skip


class LogWatch:
    """The logs of one crew."""

    def __init__(self, directory: str, plan: Plan) -> None:
        home = Path(directory)
        self._paths = {r: home / log_name(plan.generation, r, seat.worker) for r, seat in enumerate(plan.seats)}
        self._read = dict.fromkeys(self._paths, 0)
        self._partial = dict.fromkeys(self._paths, "")
        self._recent: list[Line] = []
        self._background = Background()

    def poll(self, now_s: float) -> None:
        """Take in what was written since the last time. `now_s`: seconds since the epoch."""
        for rank, path in self._paths.items():
            self._recent += messages(rank, self._fresh(rank, path))
        old = [line for line in self._recent if line.time_s < now_s - WINDOW_S]
        if old:
            self._background.learn(old, rank_seconds=WINDOW_S * len(self._paths))
            self._recent = [line for line in self._recent if line.time_s >= now_s - WINDOW_S]

    def likely(self, now_s: float) -> str:
        """The line that is likely the cause of what happened just now; empty if none is out of the ordinary."""
        self.poll(now_s)
        causes = likely_causes(self._recent, self._background, num_ranks=len(self._paths), window_s=WINDOW_S, most=8)
        told = [cause for cause in causes if not any(word in cause.line.text for word in EFFECTS)]
        return str(told[0]) if told and len(told[0].ranks) < max(2, len(self._paths)) else ""

    def _fresh(self, rank: int, path: Path) -> list[tuple[float, str]]:
        try:
            stat = path.stat()
            if stat.st_size <= self._read[rank]:
                return []
            with path.open("rb") as file:
                file.seek(max(self._read[rank], stat.st_size - MOST_BYTES))
                text = self._partial[rank] + file.read(MOST_BYTES).decode(errors="replace")
        except OSError:
            return []  # not written yet, or on another machine
        self._read[rank] = stat.st_size
        whole, _, self._partial[rank] = text.rpartition("\n")
        return [(stat.st_mtime, line) for line in whole.split("\n")]


def log_name(generation: int, rank: int, worker: str) -> str:
    """The file in which a rank's output of a generation is kept."""
    return f"g{generation:03d}_r{rank:03d}_{worker}.log"
