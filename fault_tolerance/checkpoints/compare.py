"""Compare: two checkpoints, tensor by tensor and key by key, whatever their layouts.

Rule of this file: it reports; 0.0 and -0.0 are equal, and so are two NaNs in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.checkpoints.buffers import item_bytes
from fault_tolerance.checkpoints.checkpoint import Checkpoint
from parallel.atlas import Piece, TensorSpec
from parallel.boxes import Box

_SLAB_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that differs: in how many elements, by how much at most, where that is. `what` if it is not values."""

    tensor: str
    num_different: int
    max_abs: float
    at: tuple[int, ...]
    what: str = ""

    def __str__(self) -> str:
        if self.what:
            return f"{self.tensor}: {self.what}"
        return f"{self.tensor}: {self.num_different} elements differ, by {self.max_abs:.3g} at most, at {list(self.at)}"


def differences(
    a: Checkpoint, b: Checkpoint, *, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Difference]:
    """The tensors that differ, by name. Reads a slab of rows at a time. Raises as `Checkpoint.read_into` does."""
    for name in sorted(a.index.by_name.keys() | b.index.by_name.keys()):
        one, other = a.index.by_name.get(name), b.index.by_name.get(name)
        if one is None or other is None:
            yield Difference(name, 0, math.nan, (), "only in the first" if other is None else "only in the second")
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            yield Difference(name, 0, math.nan, (), f"{one.dtype} {one.shape} and {other.dtype} {other.shape}")
        else:
            found = _compare(a, b, one, progress)
            if found is not None:
                yield found


def changed_keys(a: Mapping[str, Any], b: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) for everything that differs between two nested mappings."""
    for key in sorted(a.keys() | b.keys()):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from changed_keys(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other


def _compare(a: Checkpoint, b: Checkpoint, spec: TensorSpec, progress: Callable[[int], None]) -> Difference | None:
    total, worst, place = 0, 0.0, (0,) * len(spec.shape)
    for box in _slabs(spec):
        one, other = (_values(checkpoint, spec, box) for checkpoint in (a, b))
        progress(2 * box.size * item_bytes(spec.dtype))
        unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
        if not unequal.any():
            continue
        with np.errstate(invalid="ignore"):
            gap = np.where(unequal, np.nan_to_num(np.abs(one - other), nan=np.inf), 0.0)
        total += int(unequal.sum())
        if gap.max() > worst or total == unequal.sum():
            worst = float(gap.max())
            inside = np.unravel_index(int(gap.argmax()), gap.shape)
            place = tuple(int(i) + start for i, start in zip(inside, box.start, strict=True))
    return Difference(spec.name, total, worst, place) if total else None


def _slabs(spec: TensorSpec) -> Iterator[Box]:
    whole = Box.whole(spec.shape)
    if not spec.shape:
        yield whole
        return
    rows = max(1, _SLAB_BYTES // max(1, item_bytes(spec.dtype) * math.prod(spec.shape[1:])))
    for start in range(0, spec.shape[0], rows):
        yield whole.cut(0, start, min(spec.shape[0], start + rows))


def _values(checkpoint: Checkpoint, spec: TensorSpec, box: Box) -> NDArray[np.float64]:
    raw = np.empty(box.shape, f"u{item_bytes(spec.dtype)}")
    checkpoint.read_into({Piece(spec.name, box): raw})
    if spec.dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(spec.dtype).astype(np.float64)
