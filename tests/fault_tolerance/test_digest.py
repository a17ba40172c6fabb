"""Layout-independent digests: any tiling agrees, any mistake shows."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import struct
import subprocess
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fault_tolerance import digest as module
from fault_tolerance.digest import MODULUS, StateHasher, believed, combine, digest, reference, state_sha256
from fault_tolerance.digest_kernel import DIGEST, SOURCE, Kernel
from parallel.boxes import Box
from parallel.native import C_FLAGS, BuildError

DTYPES = ["float32", "float64", "float16", "int8", "uint8", "bool", "int64", "complex64"]


@pytest.fixture(autouse=True, params=["numpy", "C"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever is said here of digests holds for both ways to compute them."""
    found = kernel() if request.param == "C" else None
    monkeypatch.setattr(module, "fast", lambda: found)
    return str(request.param)


@functools.cache
def kernel() -> Kernel:
    try:
        DIGEST.build()
    except BuildError as error:
        pytest.skip(str(error))
    return Kernel(DIGEST.path())


def whole(array: np.ndarray, name: str = "param/w") -> int:
    return digest(array, name=name, box=Box.whole(array.shape))


def some(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return raw.view(dtype)[..., 0] if dtype != "bool" else raw[..., 0] > 127


def tile(box: Box, chooser: random.Random, depth: int) -> list[Box]:
    """Random guillotine cuts of a box."""
    dims = [d for d, extent in enumerate(box.shape) if extent > 1]
    if not dims or not depth:
        return [box]
    dim = chooser.choice(dims)
    at = chooser.randrange(1, box.shape[dim])
    halves = (box.cut(dim, 0, at), box.cut(dim, at, box.shape[dim]))
    return [part for half in halves for part in tile(half, chooser, depth - 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    leaf=st.sampled_from([2, 16, 1 << 15]),
)
def test_any_tiling_gives_the_same_sum(shape, dtype, seed, leaf) -> None:
    array = some(shape, dtype, seed)
    total = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAF", leaf)
        for part in tile(Box.whole(shape), random.Random(seed), 5):
            total = combine(total, digest(array[part.within(Box.whole(shape))], name="param/w", box=part))
    assert total == whole(array)


def by_definition(array: np.ndarray, name: str) -> int:
    """The formula of the header, element by element in Python's integers."""
    weights = [[int(w) for w in module._weights(module._seed(name, d), 0, n)] for d, n in enumerate(array.shape)]
    total, bits = 0, array.view(f"u{array.dtype.itemsize}")
    for place in product(*map(range, array.shape)):
        spread = int(bits[place]) * int(module._SPREAD) % MODULUS
        term = (spread ^ spread >> 32) + module._MISSING
        for dim, i in enumerate(place):
            term = term * weights[dim][i] % MODULUS
        total += term
    return total % MODULUS


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_the_fast_sum_equals_the_definition(shape: tuple[int, ...], dtype: str) -> None:
    array = some(shape, dtype)
    assert whole(array) == by_definition(array, "param/w")


def test_the_definition_has_not_changed() -> None:
    """Checkpoints hold digests: what was written by an older version must still be found right."""
    assert whole(np.arange(12, dtype=np.float32).reshape(3, 4)) == 0x265D9713398956DE


@pytest.mark.parametrize("way", ["C"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    long=st.integers(1, 2500),
    dtype=st.sampled_from(DTYPES),
    start=st.integers(0, 1 << 40),
    strides=st.lists(st.sampled_from([-2, -1, 1, 2, 3]), min_size=4, max_size=4),
    turned=st.booleans(),
    offset=st.integers(0, 8),
)
def test_the_kernel_gives_numpys_number_for_any_width_strides_box_length_and_alignment(
    shape, long, dtype, start, strides, turned, offset
) -> None:
    width = np.dtype(dtype).itemsize
    shape = (*shape[:-1], long)
    big = tuple(extent * abs(stride) for extent, stride in zip(shape, strides, strict=False))
    raw = np.random.default_rng(long).integers(0, 2, int(np.prod(big)) * width + offset, np.uint8)
    array = raw[offset:].view(dtype).reshape(big)  # unaligned, for most offsets
    array = array[tuple(slice(None, None, stride) for stride in strides[: len(shape)])]
    array = array.T if turned else array
    box = Box(tuple(start + d for d in range(array.ndim)), tuple(start + d + n for d, n in enumerate(array.shape)))
    assert digest(array, name="param/w", box=box) == reference(array, name="param/w", box=box)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["C"], indirect=True)
def test_without_the_wide_instructions_the_kernel_gives_the_same(tmp_path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    plain = tmp_path / "plain.so"
    subprocess.run(["cc", *C_FLAGS, "-DPLAIN", str(SOURCE), "-o", str(plain)], check=True)
    assert believed(plain) is not None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["C"], indirect=True)
def test_a_library_that_computes_something_else_is_not_believed(tmp_path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(SOURCE.read_text().replace("x ^ x >> 31", "x ^ x >> 30"))
    subprocess.run(["cc", *C_FLAGS, str(source), "-o", str(library)], check=True)
    assert believed(library) is None
    torn = tmp_path / "torn.so"
    torn.write_bytes(library.read_bytes()[:1])
    assert believed(torn) is None
    assert believed(tmp_path / "absent.so") is None


@pytest.mark.parametrize("shape", [(70_000,), (70_000, 2), (3, 40_000), (200_001, 1)])
def test_large_dimensions_are_cut_without_a_seam(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    array = some(shape, "float32")
    cut = whole(array)
    monkeypatch.setattr(module, "_EXTENT", 1 << 30)
    monkeypatch.setattr(module, "_LEAF", 1 << 20)
    assert whole(array) == cut


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_flip_changes_it(dtype: str) -> None:
    array = some((2, 3), dtype)
    before, bits = whole(array), 1 if dtype == "bool" else array.dtype.itemsize * 8
    raw = array.view(np.uint8).reshape(6, -1)
    for element in range(6):
        for bit in range(bits):
            raw[element, bit // 8] ^= 1 << bit % 8
            assert whole(array) != before
            raw[element, bit // 8] ^= 1 << bit % 8
    assert whole(array) == before


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_swap_of_a_number_and_its_negative_changes_it(dtype: str) -> None:
    """Their bits differ by 2^63 in float64, and weights by an even number: without the spreading f this goes unseen."""
    for i in range(1, 2000, 5):
        array = np.zeros(2001, dtype)
        array[0], array[i] = 1.5, -1.5
        before = whole(array)
        array[0], array[i] = -1.5, 1.5
        assert whole(array) != before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.data())
def test_swapped_elements_rows_and_blocks_change_it(seed: int, data: st.DataObject) -> None:
    array = some((8, 8), "float32", seed)
    before = whole(array)
    a, b = (data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7))) for _ in range(2))
    if array[a].tobytes() != array[b].tobytes():
        swapped = array.copy()
        swapped[a], swapped[b] = array[b], array[a]
        assert whole(swapped) != before
    others = [array.T, array[::-1], np.roll(array, 1, axis=1), np.roll(array, 4, axis=0)]
    blocks = array.copy()
    blocks[:4, :4], blocks[4:, 4:] = array[4:, 4:], array[:4, :4]
    turned = array.copy()
    turned[:4, 4:] = array[:4, 4:].T
    for other in (*others, blocks, turned):
        assert whole(other) != before


def test_forgotten_doubled_and_misnamed_pieces_change_it_even_if_zero() -> None:
    zeros = np.zeros((4, 4), np.float32)
    half = digest(zeros[:2], name="exp_avg/w", box=Box((0, 0), (2, 4)))
    other = digest(zeros[2:], name="exp_avg/w", box=Box((2, 0), (4, 4)))
    total = whole(zeros, "exp_avg/w")
    assert combine(half, other) == total
    assert total not in (half, other, combine(half, half), whole(zeros, "exp_avg_sq/w"), combine(total, half))


def test_strides_do_not_matter_and_nothing_is_written() -> None:
    array = some((60, 50), "float32")
    array.flags.writeable = False
    assert whole(np.asfortranarray(array)) == whole(array)
    big = some((100, 100), "float32")
    assert whole(big[::2, 10:60]) == whole(big[::2, 10:60].copy())


def test_scalars_and_empty_tensors() -> None:
    one, two = np.array(1.0, np.float32), np.array(2.0, np.float32)
    assert whole(one) != whole(two) and whole(one) != whole(one, "param/v")
    assert whole(np.zeros((0, 4), np.float32)) == 0


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the box's shape \(2,\), got \(3,\)"):
        digest(np.zeros(3), name="w", box=Box.whole((2,)))
    for dtype in ("complex128", "O", "S3"):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 bytes"):
            whole(np.zeros(3, dtype))


def test_the_state_hash_is_what_it_says() -> None:
    w, b = some((2, 3), "float32"), some((), "float32")
    plain = b"param/b\0\0" + b.tobytes() + b"param/w\x002x3\0" + w.tobytes() + struct.pack("<q", 7)
    assert state_sha256([("param/w", w), ("param/b", b)], step=7) == hashlib.sha256(plain).hexdigest()
    hasher = StateHasher()
    hasher.begin("param/b", ())
    hasher.update(b)
    hasher.begin("param/w", (2, 3))
    hasher.update(w[:1])
    hasher.update(w[1:].astype(">f4"))
    assert hasher.finish(7) == hashlib.sha256(plain).hexdigest()
    assert state_sha256([("param/w", w.T), ("param/b", b)], step=7) != hashlib.sha256(plain).hexdigest()


def test_the_state_hash_refuses_disorder() -> None:
    hasher = StateHasher()
    hasher.begin("b", (2,))
    with pytest.raises(ValueError, match="'b' must be complete before the step, got 8 bytes too few"):
        hasher.finish(0)
    with pytest.raises(ValueError, match="float32, got float64"):
        hasher.update(np.zeros(2))
    hasher.update(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="names must ascend, got 'a' after 'b'"):
        hasher.begin("a", ())
    with pytest.raises(ValueError, match="4 bytes more"):
        hasher.update(np.zeros(1, np.float32))
