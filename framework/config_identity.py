"""Config identity: what a resumed run may change, by key, and what would make it another run.

    refused     seed, model.*, data.* (but not where it lies), optim.global_batch: the state or the order of the samples
                would no longer mean the same
    recorded    everything else that has an influence on numbers: rates, schedule, layout, precision ...
    free        where and how it is watched, and on which machines

Rule of this file: pure functions of plain configs. Whether data of another path has the same content is for their
fingerprints to say, not for this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REFUSED = ("seed", "model.", "data.", "optim.global_batch")
FREE = (
    "run_dir",
    "resume",
    "monitor.",
    "drill.",
    "cluster.",
    "detect.",
    "data.path",
    "data.cache_dir",
    "optim.num_steps",
)


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs between the run that was and the run that is to be."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


@dataclass(frozen=True, slots=True)
class Changes:
    """What a resumed run changes: what must not be, and what is to be written down."""

    refused: tuple[Change, ...]
    recorded: tuple[Change, ...]

    def require(self) -> None:
        """Raises ValueError naming the first key that must not change."""
        if self.refused:
            first, more = self.refused[0], len(self.refused) - 1
            others = f" (and {more} more: {', '.join(change.key for change in self.refused[1:])})" if more else ""
            raise ValueError(
                f"{first.key}: must be {first.before!r} as in the run that is resumed, got {first.after!r}{others}; "
                "leave it as it was, or start a new run"
            )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Compare two plain configs (`config.plain`), key by key."""
    old, new = dict(_flat(before)), dict(_flat(after))
    differing = [Change(k, old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    differing = [change for change in differing if not change.key.startswith(FREE)]
    refused = tuple(change for change in differing if change.key.startswith(REFUSED))
    return Changes(refused, tuple(change for change in differing if change not in refused))


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short digest of the keys that must not change: equal for runs that may continue each other."""
    kept = {k: v for k, v in _flat(values) if k.startswith(REFUSED) and not k.startswith(FREE)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", list(value) if isinstance(value, tuple) else value
