"""Patterns: how the parameters of another program are cut over its ranks, as a table, and what that means in boxes.

    rule                   a rank's tensor is                                             copies
    replicate              the whole                                                      equal on every rank
    average                the whole, updated independently on every rank                 their mean is the logical one
    shard(d)               part `rank` of dim d, as torch.chunk cuts it                   one
    fused(d, n1, n2, ...)  for each sub-parameter of n_i along dim d its own part         one
                           `rank`, one after the other (q k v, or gate and up)
    expert(d)              the experts of rank `ep_rank` along dim d, the number of       one
                           experts must divide
    pad(d, multiple)       rows of zeros after the logical ones, so that dim d is a       as the rule after it
                           multiple; written before another rule, as is expert
    fragment               part `dp_rank` of what the rule before it left, flattened      one
                           and padded to equal parts (ZeRO); written after another rule

    layers\\..*\\.qkv\\.weight    fused(0, 64, 32, 32)          a table: regular expression -> rules, from left to
    embed\\.weight               pad(0, 128) shard(0)          right; a name matches exactly one line, and every line
    .*norm\\.weight              replicate                     matches some name, else the table is wrong

A rank's tensor is a list of moves, box of the rank's tensor <-> box of the logical tensor; all else is geometry.

Rule of this file: pure geometry, no tensors. Source: Universal Checkpointing (arXiv 2406.18820), whose patterns these
are; here a line of the table may combine them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from parallel.atlas import TensorSpec
from parallel.boxes import Box, boxes_of_range, chunk

COPIES = ("one", "equal", "mean")
_CALL = re.compile(r"([a-z]+)(?:\(([\d,\s]*)\))?")
_ARITY = {"replicate": (0, 0), "average": (0, 0), "shard": (1, 1), "fused": (3, 99), "expert": (1, 1), "pad": (2, 2)}
_ARITY["fragment"] = (0, 0)


@dataclass(frozen=True, slots=True)
class Op:
    """One rule of a line: its name and its whole numbers."""

    name: str
    arguments: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})" if self.arguments else self.name


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank sits in the other program: its index and the degree, along tp, dp and ep."""

    tp_rank: int = 0
    tp: int = 1
    dp_rank: int = 0
    dp: int = 1
    ep_rank: int = 0
    ep: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """Elements that are the same: a box of the rank's own tensor, and a box of the logical one, in row-major order."""

    physical: Box
    logical: Box


@dataclass(frozen=True, slots=True)
class Placement:
    """A rank's tensor: its shape, what it holds of the logical one, and how copies on several ranks are related.

    What no move covers of `shape` is padding: zero on the way there, dropped on the way back.
    """

    shape: tuple[int, ...]
    moves: tuple[Move, ...]
    copies: str


def parse(text: str) -> tuple[Op, ...]:
    """A line's rules. Raises ValueError for unknown ones, wrong numbers, or a wrong order."""
    found = [_CALL.fullmatch(word) for word in re.findall(r"[a-z]+(?:\([^)]*\))?|\S+", text)]
    if not found or None in found:
        raise ValueError(f"patterns: rules must read like `pad(0, 128) shard(0)`, got {text!r}")
    ops = tuple(Op(m[1], tuple(int(n) for n in (m[2] or "").replace(",", " ").split())) for m in found if m is not None)
    for op in ops:
        low, high = _ARITY.get(op.name, (1, 0))
        if op.name not in _ARITY:
            raise ValueError(f"patterns: a rule must be one of {', '.join(_ARITY)}, got {op.name!r}")
        if not low <= len(op.arguments) <= high:
            raise ValueError(
                f"patterns: {op.name} must have {low} number(s){' or more' if high > low else ''}, got {op}"
            )
    _check_order(text, [op.name for op in ops])
    return ops


def assign(table: Mapping[str, str], names: Iterable[str]) -> dict[str, tuple[Op, ...]]:
    """The rules of every name. Raises ValueError if a name matches no line or two, or a line matches no name."""
    lines = {pattern: (re.compile(pattern), parse(text)) for pattern, text in table.items()}
    unused = set(lines)
    found: dict[str, tuple[Op, ...]] = {}
    for name in names:
        matches = [pattern for pattern, (regex, _) in lines.items() if regex.fullmatch(name)]
        if len(matches) != 1:
            got = " and ".join(map(repr, matches)) or "none"
            raise ValueError(
                f"patterns: {name} must match exactly one line of the table, got {got}; make them exclusive"
            )
        found[name] = lines[matches[0]][1]
        unused.discard(matches[0])
    if unused:
        raise ValueError(
            f"patterns: every line must match a parameter, got none for {sorted(unused)}; was a layer renamed?"
        )
    return found


def table_of(specs: Sequence[TensorSpec]) -> dict[str, str]:
    """The table of our own model, derived from its specs: one line for each parameter."""
    params = [spec for spec in specs if spec.name.startswith("param/")]
    rules = {s.name.removeprefix("param/"): "replicate" if s.tp_dim is None else f"shard({s.tp_dim})" for s in params}
    return {re.escape(name): rule for name, rule in rules.items()}


def place(ops: Sequence[Op], shape: Sequence[int], seat: Seat) -> Placement:
    """What a rank holds of a logical tensor of this shape. Raises ValueError if the rules do not fit the shape."""
    now = Placement(tuple(shape), (Move(Box.whole(shape), Box.whole(shape)),), "one")
    for op in ops:
        now = _APPLY[op.name](now, op, seat)
    return now


def _check_order(text: str, names: list[str]) -> None:
    cuts = [n for n in names if n in ("replicate", "average", "shard", "fused")]
    if len(cuts) > 1 or names.count("fragment") > 1 or ("fragment" in names and names[-1] != "fragment"):
        raise ValueError(
            f"patterns: there must be at most one of replicate, average, shard and fused, and fragment last, got {text!r}"
        )
    if cuts and any(name in ("pad", "expert") for name in names[names.index(cuts[0]) :]):
        raise ValueError(f"patterns: pad and expert must come before {cuts[0]}, got {text!r}")


def _whole(now: Placement, op: Op, seat: Seat) -> Placement:
    copies = {"replicate": "equal", "average": "mean"}[op.name]
    return Placement(now.shape, now.moves, copies)


def _shard(now: Placement, op: Op, seat: Seat) -> Placement:
    dim = _dim(now, op)
    return _take(now, dim, [chunk(now.shape[dim], seat.tp, seat.tp_rank)])


def _fused(now: Placement, op: Op, seat: Seat) -> Placement:
    dim, sizes = _dim(now, op), op.arguments[1:]
    if sum(sizes) != now.shape[dim]:
        raise ValueError(f"patterns: the sizes of {op} must add up to {now.shape[dim]}, as shape {now.shape} has there")
    ranges, start = [], 0
    for size in sizes:
        low, high = chunk(size, seat.tp, seat.tp_rank)
        ranges.append((start + low, start + high))
        start += size
    return _take(now, dim, ranges)


def _expert(now: Placement, op: Op, seat: Seat) -> Placement:
    dim = _dim(now, op)
    if now.shape[dim] % seat.ep:
        raise ValueError(f"patterns: {op}: {now.shape[dim]} experts must divide by ep {seat.ep}")
    return _take(now, dim, [chunk(now.shape[dim], seat.ep, seat.ep_rank)])


def _pad(now: Placement, op: Op, seat: Seat) -> Placement:
    dim, multiple = _dim(now, op), op.arguments[1]
    if multiple < 1:
        raise ValueError(f"patterns: the multiple of {op} must be at least 1")
    size = -(-now.shape[dim] // multiple) * multiple
    return Placement((*now.shape[:dim], size, *now.shape[dim + 1 :]), now.moves, now.copies)


def _fragment(now: Placement, op: Op, seat: Seat) -> Placement:
    """Equal flat parts; what the last ones lack is padding. ZeRO's rule, a parameter at a time."""
    total = math.prod(now.shape)
    part = -(-total // seat.dp)
    start, stop = min(total, seat.dp_rank * part), min(total, (seat.dp_rank + 1) * part)
    moves: list[Move] = []
    for box in boxes_of_range(now.shape, start, stop):
        for move in now.moves:
            common = box.intersect(move.physical)
            if common is not None:
                moves += _flattened(common, move, now.shape, start)
    return Placement((part,), tuple(moves), now.copies)


def _flattened(common: Box, move: Move, shape: tuple[int, ...], start: int) -> Iterable[Move]:
    """Each contiguous run of a box, as a range of the flat part, and the logical box that it is."""
    for offset, length in common.runs(Box.whole(shape)):
        for run in boxes_of_range(shape, offset, offset + length):
            at = next(run.runs(Box.whole(shape)))[0] - start
            yield Move(Box((at,), (at + run.size,)), _shifted(run, move.physical, move.logical))


def _take(now: Placement, dim: int, ranges: Sequence[tuple[int, int]]) -> Placement:
    """Keep these ranges along a dim, one after the other."""
    moves, at = [], 0
    for low, high in ranges:
        window = Box.whole(now.shape).cut(dim, low, high)
        for move in now.moves:
            common = move.physical.intersect(window)
            if common is not None:
                origin = common.start[dim] - low + at
                moves.append(Move(_moved(common, dim, origin), _shifted(common, move.physical, move.logical)))
        at += max(0, high - low)
    return Placement((*now.shape[:dim], at, *now.shape[dim + 1 :]), tuple(moves), now.copies)


def _shifted(part: Box, source: Box, target: Box) -> Box:
    """Where `part` of box `source` lies in box `target`, which has the same shape."""
    start = tuple(p - s + t for p, s, t in zip(part.start, source.start, target.start, strict=True))
    return Box(start, tuple(a + n for a, n in zip(start, part.shape, strict=True)))


def _moved(box: Box, dim: int, start: int) -> Box:
    """The box with another start along a dim."""
    low, high = list(box.start), list(box.stop)
    low[dim], high[dim] = start, start + box.shape[dim]
    return Box(tuple(low), tuple(high))


def _dim(now: Placement, op: Op) -> int:
    dim = op.arguments[0]
    if dim >= len(now.shape):
        raise ValueError(f"patterns: {op} must name a dim of shape {now.shape}, which has {len(now.shape)}")
    return dim


_APPLY = {
    "replicate": _whole,
    "average": _whole,
    "shard": _shard,
    "fused": _fused,
    "expert": _expert,
    "pad": _pad,
    "fragment": _fragment,
}
