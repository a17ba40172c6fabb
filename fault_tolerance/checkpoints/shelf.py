"""Shelf: the directory that holds a run's durable checkpoints, one `step_000123` each.

    checkpoints/step_000100/index.json    committed
    checkpoints/step_000110/node0-...     torn: its writers died before the commit
    checkpoints/notes/                    foreign

Rule of this file: only what has an index is a checkpoint; the rest is never taken, and swept only when it is torn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint
from fault_tolerance.checkpoints.index import OtherVersion
from fault_tolerance.checkpoints.storage import Storage, StorageError, open_storage

_STEP_NAME = re.compile(r"step_(\d{6,})")


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint: `step_000123`."""
    return f"step_{step:06d}"


def checkpoints(root: str) -> dict[int, str]:
    """The committed checkpoints of a directory: step -> path, ascending."""
    found = {step: child.url for step, child in _children(root).items() if INDEX in child.sizes()}
    return dict(sorted(found.items()))


def newest(root: str, *, ours: bool = True) -> str | None:
    """The path of the newest committed checkpoint whose index is intact, or None.

    Those of another version are passed over; with `ours=False` the newest may not be one: raises OtherVersion.
    """
    for path in reversed(checkpoints(root).values()):
        try:
            Checkpoint.open(path)
        except OtherVersion:
            if not ours:
                raise
            continue
        except (ValueError, StorageError):  # damaged on disk after its commit: an older one is better than none
            continue
        return path
    return None


def torn(root: str) -> dict[int, str]:
    """The step directories without an index: being written, or left by writers that died."""
    return {step: child.url for step, child in sorted(_children(root).items()) if INDEX not in child.sizes()}


def sweep(root: str, *, in_progress: Collection[int] = ()) -> list[int]:
    """Remove the torn directories but those of the steps in progress; returns their steps.

    Only for the one process that saves here.
    """
    doomed = [step for step in torn(root) if step not in in_progress]
    remove(root, doomed)
    return doomed


def remove(root: str, steps: Iterable[int]) -> None:
    """Remove the checkpoints of these steps. The index goes first, so that a crash leaves a torn one, not a broken."""
    children = _children(root)
    for step in steps:
        if step in children:
            children[step].remove([INDEX])
            children[step].remove_all()


def _children(root: str) -> dict[int, Storage]:
    storage = open_storage(root)
    names = (name for name in storage.children() if _STEP_NAME.fullmatch(name))
    return {int(name.removeprefix("step_")): storage.child(name) for name in names}


def locate(path: str) -> str:
    """The checkpoint that a person means by a path: itself, or the newest of a shelf, or of a run's `checkpoints/`.

    Raises ValueError if there is none.
    """
    if INDEX in open_storage(path).sizes():
        return path
    for root in (path, f"{path.rstrip('/')}/checkpoints"):
        found = newest(root)
        if found is not None:
            return found
    raise ValueError(f"{path}: must be a checkpoint, or a directory of them, or a run with one, got no {INDEX} there")
