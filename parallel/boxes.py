"""Boxes: the one geometry that sharding, snapshots and recovery speak.

    a tensor of shape (6, 4)         Box((2, 0), (4, 4))
    +---------+                      start  (2, 0)   inclusive, in whole-tensor elements
    |         |                      stop   (4, 4)   exclusive
    |#########|  <- rows 2 and 3
    |         |
    +---------+

Rule of this file: integers in, integers out. No tensors, ranks or processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open rectangle [start, stop) of a tensor, in whole-tensor elements. A scalar's box is `Box((), ())`."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box that covers a tensor of this shape."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each dimension; 0 where the box is empty."""
        return tuple([b - a if b > a else 0 for a, b in zip(self.start, self.stop, strict=True)])  # asked for very often

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """What both cover, or None where that is empty. Raises ValueError if the boxes differ in dimensions."""
        if len(self.start) != len(other.start):
            raise ValueError(f"intersect: boxes must have equal dimensions, got {self} and {other}")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(map(int.__lt__, start, stop)) else None

    def cut(self, dim: int, start: int, stop: int) -> Box:
        """The part whose coordinates along `dim`, relative to this box's own start, are in [start, stop)."""
        low = self.start[dim]
        return Box(
            (*self.start[:dim], low + start, *self.start[dim + 1 :]),
            (*self.stop[:dim], low + stop, *self.stop[dim + 1 :]),
        )

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that select this box in an array which holds `outer`. Raises ValueError if it sticks out."""
        if self.intersect(outer) != self and self.size:
            raise ValueError(f"within: {self} must lie inside {outer}")
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))

    def runs(self, outer: Box) -> Iterator[tuple[int, int]]:
        """Maximal contiguous (offset, length) element ranges of this box in a row-major array that holds `outer`.

        In ascending order; their lengths add up to `size`.
        """
        if not self.size:
            return
        shape, inner = outer.shape, self.within(outer)
        tail = len(shape)  # dims [tail:] are covered whole, so they belong to one run
        while tail > 0 and inner[tail - 1] == slice(0, shape[tail - 1]):
            tail -= 1
        run_dim = max(tail - 1, 0)
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        length = math.prod(self.shape[run_dim:])
        base = sum(s.start * stride for s, stride in zip(inner[run_dim:], strides[run_dim:], strict=True))
        yield from ((base + offset, length) for offset in _offsets(inner[:run_dim], strides[:run_dim]))


def _offsets(slices: Sequence[slice], strides: Sequence[int]) -> Iterator[int]:
    if not slices:
        yield 0
        return
    for index in range(slices[0].start, slices[0].stop):
        for rest in _offsets(slices[1:], strides[1:]):
            yield index * strides[0] + rest


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` when `torch.chunk`, DTensor and FSDP cut `size` into `parts`.

    Every part has ceil(size / parts) elements but the last ones, which may be short or empty.
    """
    step = -(-size // parts)
    return min(size, index * step), min(size, (index + 1) * step)


def even(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` when `size` is cut into `parts` whose sizes differ by one at most."""
    return size * index // parts, size * (index + 1) // parts


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that make up elements [start, stop) of a row-major flattened tensor, in order (ZeRO's flat shards).

    At most 2 * len(shape) - 1 boxes. Raises ValueError if the range leaves the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"boxes_of_range: [{start}, {stop}) must lie inside {math.prod(shape)} elements")
    if start == stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop,)) if shape else Box((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        return [_under(first, box) for box in boxes_of_range(shape[1:], start - first * inner, stop - first * inner)]
    head: list[Box] = []
    if start % inner:
        head = [_under(first, box) for box in boxes_of_range(shape[1:], start % inner, inner)]
        first += 1
    tail: list[Box] = []
    if stop % inner:
        tail = [_under(last, box) for box in boxes_of_range(shape[1:], 0, stop % inner)]
    else:
        last += 1
    whole = Box((first,) + (0,) * (len(shape) - 1), (last, *shape[1:]))
    return head + ([whole] if last > first else []) + tail


def _under(index: int, box: Box) -> Box:
    return Box((index, *box.start), (index + 1, *box.stop))
