"""Flat: how ZeRO cuts tensors over the ranks of dp: by elements, not by rows.

    ZeRO-3         each tensor by itself           | r0  | r1  | r2 ~|         ~ padding: the last part is short
    ZeRO-1, 2      the tensors of a param group    | wq    | wk  | wv    ~|    a part may begin and end within a tensor
                   laid end to end                 |  r0  |  r1  |  r2  ~|

A tensor that is not trained is in no param group: it is cut by itself in either case.

Rule of this file: pure arithmetic of DeepSpeed 0.19's partitioning (`stage_1_and_2.py`, `partition_parameters.py`;
ZeRO, arXiv 1910.02054). That DeepSpeed really holds these parts is tested against DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 2  # of a group's part, in elements: DeepSpeed's `nccl_start_alignment_factor`


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor of `numel` elements that starts at element `offset` of flat memory, cut into parts of `part` elements."""

    offset: int
    numel: int
    part: int

    def range_of(self, index: int) -> tuple[int, int]:
        """[start, stop) of the tensor's own elements that part `index` holds; an empty range where it holds none."""
        start = min(self.numel, max(0, index * self.part - self.offset))
        return start, max(start, min(self.numel, (index + 1) * self.part - self.offset))


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a tensor: the two param groups."""
    return len(shape) >= 2


def flats(
    tensors: Iterable[tuple[str, tuple[int, ...], bool]], *, parts: int, grouped: bool
) -> dict[str, Flat]:
    """Where each of the (name, shape, frozen) lies, by name. Groups are laid out in the order that is given."""
    found: dict[str, Flat] = {}
    groups: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for name, shape, frozen in tensors:
        numel = math.prod(shape)
        found[name] = Flat(0, numel, -(-numel // parts))
        if grouped and not frozen:
            groups[decays(shape)].append((name, numel))
    for members in groups.values():
        total = sum(numel for _, numel in members)
        part = -(-total // (parts * ALIGNMENT)) * ALIGNMENT
        offset = 0
        for name, numel in members:
            found[name] = Flat(offset, numel, part)
            offset += numel
    return found
