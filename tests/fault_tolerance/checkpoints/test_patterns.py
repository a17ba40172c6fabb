"""The pattern table against brute force; a mutation of any one rule is noticed."""

import itertools

import numpy as np
import pytest

from fault_tolerance.checkpoints.patterns import Seat, assign, parse, place, table_of
from fault_tolerance.checkpoints.union import gather, scatter
from tests.fault_tolerance.checkpoints.saving import decoder_specs

SHAPE = (10, 7)
LOGICAL = np.arange(70, dtype=np.float32).reshape(SHAPE) + 1


def _seats(tp: int = 1, dp: int = 1, ep: int = 1) -> list[Seat]:
    ranks = itertools.product(range(dp), range(tp), range(ep))
    return [Seat(t, tp, d, dp, e, ep) for d, t, e in ranks]


def _parts(text: str, logical: np.ndarray, seats: list[Seat]) -> list[tuple[Seat, np.ndarray]]:
    return [(seat, scatter(parse(text), logical, seat)) for seat in seats]


@pytest.mark.parametrize(
    "text",
    [
        "replicate",
        "average",
        "shard(0)",
        "shard(1)",
        "fused(0, 5, 3, 2)",
        "fused(1, 4, 3)",
        "pad(0, 8) shard(0)",
        "pad(1, 16) shard(1)",
        "expert(0) shard(1)",
        "expert(0)",
        "pad(0, 12) expert(0) fused(1, 3, 4)",
        "shard(1) fragment",
        "fused(0, 5, 3, 2) fragment",
        "pad(0, 8) shard(0) fragment",
        "replicate fragment",
        "fragment",
    ],
)
@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 3, 2), (1, 8, 1), (2, 4, 5)])
def test_there_and_back_is_the_identity(text: str, tp: int, dp: int, ep: int) -> None:
    if "expert" in text and (12 if "pad" in text else 10) % ep:
        pytest.skip("experts must divide")
    back = gather(parse(text), SHAPE, _parts(text, LOGICAL, _seats(tp, dp, ep)), name="x")
    np.testing.assert_array_equal(back, LOGICAL)


def test_shard_is_torch_chunk() -> None:
    torch = pytest.importorskip("torch")
    for dim, tp in itertools.product((0, 1), (1, 2, 3, 4)):
        chunks = torch.from_numpy(LOGICAL).chunk(tp, dim)
        for rank, chunk in enumerate(chunks):
            mine = scatter(parse(f"shard({dim})"), LOGICAL, Seat(tp_rank=rank, tp=tp))
            np.testing.assert_array_equal(mine, chunk.numpy())


def test_fused_cuts_each_sub_parameter_by_itself() -> None:
    q, k, v = LOGICAL[:4], LOGICAL[4:6], LOGICAL[6:8]
    for rank in range(2):
        mine = scatter(parse("fused(0, 4, 2, 2)"), LOGICAL[:8], Seat(tp_rank=rank, tp=2))
        expected = np.concatenate([q[2 * rank : 2 * rank + 2], k[rank : rank + 1], v[rank : rank + 1]])
        np.testing.assert_array_equal(mine, expected)


def test_fragment_is_zero_s_flat_partition() -> None:
    """ceil(U / P) elements a rank; the last is padded with zeros, and nobody's offset shifts."""
    for dp in (1, 2, 3, 4, 9, 71):
        part = -(-70 // dp)
        padded = np.concatenate([LOGICAL.ravel(), np.zeros(part * dp - 70, np.float32)])
        for rank in range(dp):
            mine = scatter(parse("fragment"), LOGICAL, Seat(dp_rank=rank, dp=dp))
            np.testing.assert_array_equal(mine, padded[rank * part : (rank + 1) * part])


def test_padding_is_zeros_and_is_stripped_again() -> None:
    parts = _parts("pad(0, 16) shard(0)", LOGICAL, _seats(tp=2))
    assert [part.shape for _, part in parts] == [(8, 7), (8, 7)]
    assert not parts[1][1][2:].any()
    parts[1][1][2:] = 99.0
    np.testing.assert_array_equal(gather(parse("pad(0, 16) shard(0)"), SHAPE, parts, name="x"), LOGICAL)


def test_averaged_copies_give_their_mean_and_replicated_ones_must_agree() -> None:
    a, b = _seats(tp=2)
    drifted = LOGICAL + np.float32(0.5)
    mean = gather(parse("average"), SHAPE, [(a, LOGICAL), (b, drifted)], name="norm")
    np.testing.assert_array_equal(mean, LOGICAL + np.float32(0.25))
    with pytest.raises(ValueError, match="copies of norm must be equal"):
        gather(parse("replicate"), SHAPE, [(a, LOGICAL), (b, drifted)], name="norm")


def test_a_missing_or_misshapen_part_is_refused() -> None:
    parts = _parts("shard(0)", LOGICAL, _seats(tp=3))
    with pytest.raises(ValueError, match="lacks 28 of 70 elements"):
        gather(parse("shard(0)"), SHAPE, parts[:1] + parts[2:], name="x")
    with pytest.raises(ValueError, match=r"must have shape \(4, 7\)"):
        gather(parse("shard(0)"), SHAPE, [(parts[0][0], LOGICAL)], name="x")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fused(0, 5, 3, 2)", "fused(0, 3, 5, 2)"),  # sub-parameters swapped: the shapes fit, the values do not
        ("fused(0, 4, 6)", "shard(0)"),  # a fused parameter joined naively
        ("fused(1, 4, 3)", "fused(1, 3, 4)"),
        ("pad(0, 12) shard(0)", "shard(0)"),  # padding not stripped
        ("shard(0)", "shard(1)"),
        ("shard(0)", "replicate"),
        ("replicate", "shard(0)"),
        ("average", "replicate"),
        ("expert(0)", "shard(0)"),
        ("fragment", "shard(0)"),
        ("shard(1) fragment", "fragment"),
        ("pad(0, 16) fragment", "fragment"),
    ],
)
def test_a_mutated_rule_never_gives_the_right_tensor_in_silence(right: str, wrong: str) -> None:
    square = np.arange(100, dtype=np.float32).reshape(10, 10)[:, : 7 if "1" in right else 10]
    seats = _seats(tp=2, dp=2, ep=2)
    parts = _parts(right, square, seats)
    if right == "average":
        parts = [(seat, part + seat.tp_rank) for seat, part in parts]
    try:
        back = gather(parse(wrong), square.shape, parts, name="x")
    except ValueError:
        return
    assert not np.array_equal(back, square)


def test_the_table_is_strict() -> None:
    names = ["embed.weight", "layers.0.norm.weight", "layers.0.qkv.weight"]
    table = {
        r"embed\.weight": "pad(0, 128) shard(0)",
        r".*norm\.weight": "replicate",
        r".*qkv\.weight": "fused(0, 2, 1, 1)",
    }
    assert [str(op) for op in assign(table, names)["embed.weight"]] == ["pad(0, 128)", "shard(0)"]
    with pytest.raises(ValueError, match="head.weight must match exactly one line of the table, got none"):
        assign(table, [*names, "head.weight"])
    with pytest.raises(ValueError, match="exactly one line"):
        assign(table | {r"layers\..*": "shard(0)"}, names)
    with pytest.raises(ValueError, match=r"got none for .*mlp.*; was a layer renamed"):
        assign(table | {r".*mlp\.weight": "shard(0)"}, names)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must read like"),
        ("shard[0]", "must read like"),
        ("split(0)", "must be one of"),
        ("shard", "must have 1 number"),
        ("fused(0, 4)", "3 number.* or more"),
        ("shard(0) replicate", "at most one of"),
        ("fragment shard(0)", "fragment last"),
        ("shard(0) pad(0, 8)", "must come before shard"),
    ],
)
def test_wrong_rules_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [("shard(2)", "must name a dim"), ("fused(0, 4, 4)", "must add up to 10"), ("expert(0)", "must divide by ep 3")],
)
def test_rules_that_do_not_fit_the_shape_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        place(parse(text), SHAPE, Seat(tp=2, ep=3))


def test_our_own_model_s_table_is_derived() -> None:
    specs = decoder_specs()
    rules = assign(table_of(specs), [s.name.removeprefix("param/") for s in specs if s.name.startswith("param/")])
    assert str(rules["layers.0.ffn.down.weight"][0]) == "shard(1)"
    assert str(rules["layers.0.attention_norm.weight"][0]) == "replicate"
