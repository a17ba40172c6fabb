"""Every rule of the pattern language is broken on purpose, in its code and in our model's table: each time it shows.

The laws below are written without the language: with torch.chunk, numpy and a drawing. What breaks no law is a rule
that nothing tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fault_tolerance.checkpoints import patterns
from fault_tolerance.checkpoints.patterns import Move, Op, Placement, Seat, assign, parse, table_of
from fault_tolerance.checkpoints.union import gather, scatter
from framework.model import Decoder
from parallel.assemble import meta
from parallel.boxes import Box
from parallel.specs import state_specs

WHOLE = np.arange(1, 85, dtype=np.float32).reshape(12, 7)
Apply = Callable[[Placement, Op, Seat], Placement]


def cut(text: str, **seat: int) -> np.ndarray:
    return scatter(parse(text), WHOLE, Seat(**seat))


def chunks(dim: int, parts: int, whole: np.ndarray = WHOLE) -> list[np.ndarray]:
    return [part.numpy() for part in torch.from_numpy(whole).chunk(parts, dim)]


def laws() -> Iterator[tuple[str, Callable[[], bool]]]:
    """(what must hold, whether it does)."""
    for dim in (0, 1):
        yield f"shard({dim})", lambda dim=dim: all(
            np.array_equal(cut(f"shard({dim})", tp_rank=i, tp=5), part) for i, part in enumerate(chunks(dim, 5))
        )
    yield "fused", lambda: all(
        np.array_equal(
            cut("fused(0, 6, 4, 2)", tp_rank=i, tp=2),
            np.concatenate([chunks(0, 2, WHOLE[a:b])[i] for a, b in ((0, 6), (6, 10), (10, 12))]),
        )
        for i in range(2)
    )
    yield "expert", lambda: all(np.array_equal(cut("expert(0)", ep_rank=e, ep=3, tp_rank=1, tp=2), WHOLE[4 * e : 4 * e + 4]) for e in range(3))
    yield "pad", lambda: np.array_equal(
        np.concatenate([cut("pad(1, 4) shard(1)", tp_rank=i, tp=2) for i in range(2)], 1), np.pad(WHOLE, ((0, 0), (0, 1)))
    )
    yield "fragment", lambda: np.array_equal(
        np.concatenate([cut("fragment", dp_rank=i, dp=5, tp_rank=1, tp=2) for i in range(5)]), np.pad(WHOLE.ravel(), (0, 1))
    )
    yield "replicate", lambda: np.array_equal(cut("replicate", tp_rank=1, tp=2), WHOLE) and drifted("replicate") is None
    yield "average", lambda: np.array_equal(drifted("average"), WHOLE + np.float32(0.25))


def drifted(text: str) -> np.ndarray | None:
    """Two copies, one of them off by a half: what comes of them, None if they are refused."""
    copies = [(Seat(tp_rank=i, tp=2), WHOLE + np.float32(0.5 * i)) for i in range(2)]
    try:
        return gather(parse(text), WHOLE.shape, copies, name="x")
    except ValueError:
        return None


def broken() -> list[str]:
    """The laws that do not hold."""

    def holds(law: Callable[[], bool]) -> bool:
        try:
            return bool(law())
        except (ValueError, IndexError, AssertionError):
            return False

    return [name for name, law in laws() if not holds(law)]


def floor_chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Balanced parts, where torch's are all of one size but the last ones."""
    return size * index // parts, size * (index + 1) // parts


def _with_chunk(apply: Apply) -> Apply:
    def mutant(now: Placement, op: Op, seat: Seat) -> Placement:
        kept, patterns.chunk = patterns.chunk, floor_chunk
        try:
            return apply(now, op, seat)
        finally:
            patterns.chunk = kept

    return mutant


def _with_seat(apply: Apply, **swap: str) -> Apply:
    return lambda now, op, seat: apply(now, op, replace(seat, **{k: getattr(seat, v) for k, v in swap.items()}))


def _with_op(apply: Apply, change: Callable[[Op], Op]) -> Apply:
    return lambda now, op, seat: apply(now, change(op), seat)


def _as(name: str, *arguments: int) -> Apply:
    return lambda now, op, seat: patterns._APPLY[name](now, Op(name, arguments or op.arguments), seat)


def _shifted_moves(apply: Apply) -> Apply:
    """Off by one along the first dimension of what it is made of."""

    def mutant(now: Placement, op: Op, seat: Seat) -> Placement:
        found = apply(now, op, seat)
        moves = tuple(
            Move(m.physical, Box((max(0, m.logical.start[0] - 1), *m.logical.start[1:]), (max(m.logical.start[0] - 1, 0) + m.logical.shape[0], *m.logical.stop[1:])))
            for m in found.moves
        )  # fmt: skip
        return replace(found, moves=moves)

    return mutant


def _copies(apply: Apply, copies: str) -> Apply:
    return lambda now, op, seat: replace(apply(now, op, seat), copies=copies)


_A = dict(patterns._APPLY)
MUTANTS: list[tuple[str, str, Apply]] = [
    ("replicate", "copies are averaged", _copies(_A["replicate"], "mean")),
    ("replicate", "it is cut", _as("shard", 0)),
    ("average", "copies must be equal", _copies(_A["average"], "equal")),
    ("average", "the last copy wins", _copies(_A["average"], "one")),
    ("shard", "balanced parts", _with_chunk(_A["shard"])),
    ("shard", "the other dim", _with_op(_A["shard"], lambda op: Op("shard", (1 - op.arguments[0],)))),
    ("shard", "along dp", _with_seat(_A["shard"], tp_rank="dp_rank", tp="dp")),
    ("shard", "off by one", _shifted_moves(_A["shard"])),
    ("shard", "not cut", lambda now, op, seat: now),
    ("fused", "as one parameter", _as("shard", 0)),
    ("fused", "two sub-parameters swapped", _with_op(_A["fused"], lambda op: Op("fused", (op.arguments[0], *op.arguments[:0:-1])))),
    ("fused", "along dp", _with_seat(_A["fused"], tp_rank="dp_rank", tp="dp")),
    ("expert", "along tp", _as("shard", 0)),
    ("expert", "not cut", lambda now, op, seat: now),
    ("expert", "the rank before", lambda now, op, seat: _A["expert"](now, op, replace(seat, ep_rank=(seat.ep_rank - 1) % seat.ep))),
    ("pad", "not padded", lambda now, op, seat: now),
    ("pad", "a larger multiple", _with_op(_A["pad"], lambda op: Op("pad", (op.arguments[0], 3 * op.arguments[1])))),
    ("pad", "the other dim", _with_op(_A["pad"], lambda op: Op("pad", (1 - op.arguments[0], op.arguments[1])))),
    ("fragment", "along tp", _with_seat(_A["fragment"], dp_rank="tp_rank", dp="tp")),
    ("fragment", "not cut", lambda now, op, seat: now),
    ("fragment", "the rank after", lambda now, op, seat: _A["fragment"](now, op, replace(seat, dp_rank=(seat.dp_rank + 1) % seat.dp))),
]  # fmt: skip


def test_all_laws_hold_of_the_rules_as_they_are() -> None:
    assert broken() == []
    assert {rule for rule, _, _ in MUTANTS} == set(patterns._APPLY)


@pytest.mark.parametrize(("rule", "mutant"), [pytest.param(r, m, id=f"{r}: {what}") for r, what, m in MUTANTS])
def test_a_mutated_rule_breaks_a_law(monkeypatch: pytest.MonkeyPatch, rule: str, mutant: Apply) -> None:
    monkeypatch.setitem(patterns._APPLY, rule, mutant)
    assert broken()


def test_any_other_line_in_our_model_s_table_is_noticed() -> None:
    """Each parameter's line becomes each other rule. Parts are cut by torch, not by the table."""
    model = {"vocab_size": 37, "num_layers": 1, "dim": 12, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 20}
    specs = [s for s in state_specs(meta(functools.partial(Decoder, **model))) if s.kind == "param"]
    rules = assign(table_of(specs), [s.name.removeprefix("param/") for s in specs])
    rng = np.random.default_rng(0)
    for spec in specs:
        name, whole = spec.name.removeprefix("param/"), rng.standard_normal(spec.shape).astype(np.float32)
        cuts = [whole, whole] if spec.tp_dim is None else chunks(spec.tp_dim, 2, whole)
        parts = [(Seat(tp_rank=i, tp=2), np.ascontiguousarray(part)) for i, part in enumerate(cuts)]
        right = " ".join(map(str, rules[name]))
        np.testing.assert_array_equal(gather(parse(right), spec.shape, parts, name=name), whole)
        others = {"replicate", "average", "expert(0)", *(f"shard({d})" for d in range(len(spec.shape)))} - {right}
        others |= {f"fused(0, 2, {spec.shape[0] - 2})", f"pad(0, {spec.shape[0] + 1}) {right}", "fragment"}
        for wrong in others:
            assert _noticed(wrong, spec.shape, parts, whole), f"{name}: {right} -> {wrong}"


def _noticed(wrong: str, shape: tuple[int, ...], parts: list[tuple[Seat, np.ndarray]], whole: np.ndarray) -> bool:
    """It is refused, gives another tensor, or lets copies that drifted apart pass."""
    try:
        if not np.array_equal(gather(parse(wrong), shape, parts, name="x"), whole):
            return True
        gather(parse(wrong), shape, [(parts[0][0], parts[0][1]), (parts[1][0], parts[1][1] + 1)], name="x")
    except ValueError:
        return True
    return wrong == "average"
