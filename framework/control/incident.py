"""Incident: trouble, decision and recovery, as one record; and the pure rules that read trouble out of what is seen.

    seen (a call that ended, a worker that does not answer, a node that is gone, no progress) -> Trouble
    Trouble + plan + restore -> Incident, which is written to events and to the summary

Rule of this file: pure values. It starts and asks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("crash", "node_loss", "hang", "mismatch", "slow_compute", "slow_link", "nan", "preemption", "resize", "controller")
HOLD = "hold"  # the ranks keep their state themselves
TIERS = ("local", "peer_memory", "parity", "durable", "fresh")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a generation ended before its time. `silent_s`: since the last sign of life of who is at fault.

    `remedy`: what was decided about somebody slow, by the name of the action; HOLD where vaults are lost and all ranks live.
    `ways`: those that are dead, (from, to)."""

    kind: str
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    evidence: str
    step: int
    detected_at: float
    silent_s: float = 0.0
    remedy: str = ""
    ways: tuple[tuple[str, str], ...] = ()

    @property
    def planned(self) -> bool:
        """Whether the crew can be asked to end at a step boundary, because everybody still works."""
        return self.remedy == HOLD or self.kind in ("preemption", "resize", "slow_compute", "slow_link", "controller")

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.ranks))}" if self.ranks else "no rank"
        where = f" on {', '.join(self.nodes)}" if self.nodes else ""
        told = "" if self.ways or self.evidence.startswith(f"{who}{where}") else f"{who}{where}: "
        return f"{self.kind}: {told}{self.evidence}"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one rank's restore did. Times in seconds."""

    tier: str
    step: int
    connect_s: float = 0.0
    build_s: float = 0.0
    restore_s: float = 0.0
    bytes_local: int = 0
    bytes_peer: int = 0
    bytes_decoded: int = 0


@dataclass(slots=True)
class Incident:
    """One record from trouble to the first new step."""

    trouble: Trouble
    layout_before: str
    decision: str = ""
    layout_after: str = ""
    tier: str = ""
    steps_lost: int = 0
    detect_s: float = 0.0
    abort_s: float = 0.0
    plan_s: float = 0.0
    muster_s: float = 0.0
    restore_s: float = 0.0
    first_step_s: float = 0.0
    total_s: float = 0.0
    bytes_decoded: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def restored(self, recoveries: Sequence[Recovery]) -> None:
        """Enter the slowest rank's time, the costliest tier and the sum of decoded bytes."""
        if not recoveries:
            return
        self.tier = max((r.tier for r in recoveries), key=TIERS.index)
        self.restore_s = max(r.restore_s for r in recoveries)
        self.bytes_decoded = sum(r.bytes_decoded for r in recoveries)
        self.extra |= {
            "connect_s": max(r.connect_s for r in recoveries),
            "build_s": max(r.build_s for r in recoveries),
            "bytes_local": sum(r.bytes_local for r in recoveries),
            "bytes_peer": sum(r.bytes_peer for r in recoveries),
        }

    def plain(self) -> dict[str, Any]:
        """The record as it is written."""
        record = asdict(self)
        trouble, extra = record.pop("trouble"), record.pop("extra")
        trouble.pop("silent_s")
        return trouble | record | extra
