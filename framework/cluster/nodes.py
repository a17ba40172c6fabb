"""Nodes: machines as the inventory sees them, and the ways in which a call to one of their processes can fail.

Rule of this file: values only. It knows neither Ray nor processes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

NODE_LABEL = "holdfast.io/node"
DOMAIN_LABEL = "holdfast.io/domain"


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `name` is stable: a machine that comes back has a new `ray_id` under its old name."""

    name: str
    ray_id: str
    ip: str
    alive: bool
    draining: bool = False
    head: bool = False
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    port: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    domain: str = ""


class Exit(Enum):
    """Why a process is gone."""

    SIGNAL = "signal"
    OOM = "out of memory"
    NODE = "its node died"
    EXITED = "exited"
    INIT = "its constructor failed"
    KILLED = "killed by us"
    UNKNOWN = "unknown"


class ClusterError(RuntimeError):
    """The cluster cannot be started, joined or used as asked. The message says what is needed, present and missing."""


class CallError(RuntimeError):
    """A call to an actor did not return a value."""

    def __init__(self, message: str, *, actor: str, node: str) -> None:
        super().__init__(message)
        self.actor, self.node = actor, node


class WorkerDied(CallError):  # noqa: N818  (an event, not a mistake)
    """The process behind the actor is gone for good."""

    def __init__(self, *, actor: str, node: str, exit: Exit, cause: str, signal: int | None = None) -> None:
        super().__init__(f"{actor} on {node} died: {cause}", actor=actor, node=node)
        self.exit, self.cause, self.signal = exit, cause, signal


def complaint(error: CallError) -> str:
    """What a process's constructor has against what it was given: the text of its ValueError, or nothing."""
    if not isinstance(error, WorkerDied) or error.exit is not Exit.INIT:
        return ""
    return error.cause.partition("ValueError: ")[2]


class WorkerUnavailable(CallError):  # noqa: N818
    """The actor cannot be reached now; mostly WorkerDied follows."""

    def __init__(self, *, actor: str, node: str, cause: str) -> None:
        super().__init__(f"{actor} on {node} cannot be reached: {cause}", actor=actor, node=node)
        self.cause = cause


class RemoteError(CallError):
    """The called method itself raised."""

    def __init__(self, *, actor: str, node: str, kind: str, message: str, traceback: str) -> None:
        super().__init__(f"{actor} on {node} raised {kind}: {message}", actor=actor, node=node)
        self.kind, self.message, self.traceback = kind, message, traceback


def one_life(rows: Sequence[Mapping[str, Any]], accepts: Callable[[Mapping[str, Any]], bool]) -> list[Mapping[str, Any]]:
    """The rows of Ray's node table, with former lives of machines dead although Ray has not noticed it yet.

    A machine that was rebooted is listed twice until Ray's health check has given up its former life: two living rows of one
    name, of which only the newer one's raylet `accepts` a connection. Several raylets on one machine all do.
    """
    names = [_base_name(row) for row in rows]
    alive = Counter(name for name, row in zip(names, rows, strict=True) if row["Alive"])
    return [
        {**row, "Alive": False} if row["Alive"] and alive[name] > 1 and not accepts(row) else row
        for name, row in zip(names, rows, strict=True)
    ]


def _base_name(row: Mapping[str, Any]) -> str:
    return str((row.get("Labels") or {}).get(NODE_LABEL) or row.get("NodeName") or row["NodeManagerAddress"])


def machine_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each machine of Ray's node table: its label, else Ray's name for it, else its address.

    Where several living machines share one, the id tells them apart.
    """
    names = [_base_name(row) for row in rows]
    alive = [name for name, row in zip(names, rows, strict=True) if row["Alive"]]
    return [f"{n}-{row['NodeID'][:4]}" if alive.count(n) > 1 else n for n, row in zip(names, rows, strict=True)]


def joined(nodes: Sequence[Node], *, ours: Mapping[str, int], at_most: int) -> tuple[Node, ...]:
    """The nodes of a cluster that a run makes use of: those it lives on (`ours`: processes by node), then others by name."""
    return tuple(sorted(nodes, key=lambda node: (-bool(ours.get(node.name)), natural(node.name)))[:at_most])


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which n2 comes before n10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
