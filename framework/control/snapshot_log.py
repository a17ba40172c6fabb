"""SnapshotLog: what the vaults of one generation say, put together: one event a snapshot, and what may be lost now.

    every vault   snapshot   its part is protected, or was given up: bytes, wire bytes, stage and encode seconds
    every rank    gated      how long its step waited for the copy                     } one event when all have spoken
    scrubbers     bad_chunk  a held chunk lost its hash; repaired or not               -> an event of its own

    tolerance now    of this generation's protected snapshot: m of each group, less the vaults that are gone since
                     before there is one: what the snapshot that it started from can still spare

Rule of this file: pure, no sockets and no clocks. A stall that nobody will tell any more (its rank died) is None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fault_tolerance.coding.placement import tolerance
from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan

SECONDS = ("copy_s", "stage_s", "hash_s", "encode_s", "total_s")


@dataclass(slots=True)
class _Parts:
    """What is known of one step's snapshot."""

    by_node: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    stalls: dict[int, float] = field(default_factory=dict)


class SnapshotLog:
    """One generation. `base` is the snapshot that it started from, if it started from one."""

    def __init__(self, plan: SnapshotPlan, base: Snapshot | None) -> None:
        self.plan, self._base = plan, base
        self.protected: int | None = None
        self._parts: dict[int, _Parts] = {}
        self._ready: list[dict[str, Any]] = []
        self._damaged: dict[int, int] = {}

    def hear(self, node: str, event: Mapping[str, Any]) -> None:
        """An event of a vault; one of another generation is nothing to us."""
        if event.get("generation") != self.plan.generation:
            return
        step = int(event.get("step", -1))
        match event["kind"]:
            case "snapshot":
                self._parts.setdefault(step, _Parts()).by_node[node] = event
                self._end(step)
            case "gated":
                self._parts.setdefault(step, _Parts()).stalls[int(event["rank"])] = float(event["stall_s"])
            case "bad_chunk":
                self._ready.append(self._damage(node, step, event))

    def take(self, *, last: bool = False) -> list[dict[str, Any]]:
        """Events that are complete. `last`: nobody will say anything more of this generation."""
        for step in sorted(self._parts):
            parts, later = self._parts[step], any(other > step and p.by_node for other, p in self._parts.items())
            if self._whole(parts) and (len(parts.stalls) == len(self.plan.seats) or later or last):
                self._ready.append(self._event(step, self._parts.pop(step)))
        ready, self._ready = self._ready, []
        return ready

    def tolerance(self, lost: Collection[str]) -> int:
        """How many more nodes may be lost now, whichever they are, with those vaults gone; 0 also if nothing is kept."""
        if self.protected is not None:
            left = tolerance(self.plan.groups, lost) - (1 if self._damaged.get(self.protected) else 0)
        elif self._base is not None:
            left = self._base.spare - sum(holder.node in lost for holder in self._base.holders)
        else:
            left = 0
        return max(0, left)

    def _whole(self, parts: _Parts) -> bool:
        return parts.by_node.keys() >= set(self.plan.members)

    def _end(self, step: int) -> None:
        parts = self._parts[step]
        if self._whole(parts) and all(part["state"] == "protected" for part in parts.by_node.values()):
            self.protected = max(step, self.protected if self.protected is not None else step)

    def _event(self, step: int, parts: _Parts) -> dict[str, Any]:
        said = list(parts.by_node.values())
        failed = [str(part["reason"]) for part in said if part["state"] != "protected"]
        stall_s = max(parts.stalls.values()) if len(parts.stalls) == len(self.plan.seats) else None
        return {
            "step": step,
            "reason": failed[0] if failed else "protected",
            "protected": not failed,
            "bytes": sum(int(part["bytes"]) for part in said),
            "wire_bytes": sum(int(part["wire_bytes"]) for part in said),
            "stall_ms": None if stall_s is None else 1e3 * stall_s,
            **{name: max(float(part.get(name, 0.0)) for part in said) for name in SECONDS},
        }

    def _damage(self, node: str, step: int, event: Mapping[str, Any]) -> dict[str, Any]:
        repaired = bool(event["repaired"])
        if not repaired:
            self._damaged[step] = self._damaged.get(step, 0) + 1
        ending = "made again from the other blocks of its stripe" if repaired else "treated as erased"
        where = f"chunk {event['chunk']} of {event['block']} of step {step} on {node}"
        return {
            "kind": "trouble",
            "step": step,
            "reason": f"scrub: {where} does not have its hash any more; {ending}",
            "cause": "damage",
            "nodes": [node],
            "repaired": repaired,
        }
