"""The erasure code: every loss it promises to survive, on both backends, byte for byte."""

from __future__ import annotations

import threading
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance.coding import crc, gf256, isal
from fault_tolerance.coding.codec import BACKENDS, Codec, as_bytes, choose, crc32c

HERE = [name for name in BACKENDS if name == "numpy" or isal.load()[0] is not None]
SMALL = [pytest.param(k, m, marks=[pytest.mark.slow] * (k > 4 or m > 2)) for k in range(1, 9) for m in range(1, 5)]


def blocks(codec: Codec, length: int, *, seed: int = 0, offset: int = 0) -> list[np.ndarray]:
    """Data and parity blocks, each starting `offset` bytes off its allocation."""
    random = np.random.default_rng(seed)
    store = [np.empty(length + offset, np.uint8)[offset:] for _ in range(codec.k + codec.m)]
    for block in store[: codec.k]:
        block[:] = random.integers(0, 256, length, np.uint8)
    codec.encode(store[: codec.k], store[codec.k :])
    return store


def lose_and_decode(codec: Codec, whole: list[np.ndarray], lost: tuple[int, ...]) -> None:
    present = {i: block for i, block in enumerate(whole) if i not in lost}
    wanted = {i: np.full_like(whole[0], 0xAA) for i in lost}
    codec.decode(present, wanted)
    for index, block in wanted.items():
        assert np.array_equal(block, whole[index]), (codec, lost, index)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("k", "m"), SMALL)
def test_every_pattern_of_up_to_m_losses_is_decoded(k: int, m: int, backend: str) -> None:
    codec = Codec(k, m, backend=backend)
    whole = blocks(codec, 37, seed=k * 16 + m)
    for count in range(m + 1):
        for lost in combinations(range(k + m), count):
            lose_and_decode(codec, whole, lost)


@pytest.mark.parametrize("backend", HERE)
@given(data=st.data(), k=st.integers(1, 254), length=st.integers(0, 700), offset=st.integers(0, 9))
def test_random_codes_up_to_255_blocks_odd_lengths_and_alignments(data, backend, k, length, offset) -> None:
    m = data.draw(st.integers(1, 255 - k).filter(lambda m: m <= 20 or k < 40), label="m") if k < 254 else 1
    codec = Codec(k, m, backend=backend)
    whole = blocks(codec, length, seed=length, offset=offset)
    lost = data.draw(st.lists(st.integers(0, k + m - 1), unique=True, max_size=min(m, 12)), label="lost")
    lose_and_decode(codec, whole, tuple(lost))


@pytest.mark.skipif(len(HERE) < 2, reason="ISA-L is not on this machine")
@pytest.mark.parametrize("length", [0, 1, 7, 31, 64, 65, 4097, pytest.param(100_003, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 3), (4, 1), (4, 2), (8, 4), (6, 3), (10, 9), (200, 55)])
def test_both_backends_make_the_same_bytes(k: int, m: int, length: int) -> None:
    if k == 200 and length > 5000:
        pytest.skip("slow and no new case")
    ours, theirs = (blocks(Codec(k, m, backend=b), length, offset=3) for b in BACKENDS)
    assert all(map(np.array_equal, ours, theirs))


def test_the_first_parity_is_the_xor_of_the_data() -> None:
    for m in (1, 2, 4):
        whole = blocks(Codec(5, m), 1000)
        assert np.array_equal(whole[5], np.bitwise_xor.reduce(np.stack(whole[:5])))


def test_one_data_block_is_replicated() -> None:
    whole = blocks(Codec(1, 1), 99)
    assert np.array_equal(whole[0], whole[1])


@pytest.mark.parametrize("backend", HERE)
def test_fewer_than_k_blocks_are_reported_lost_never_as_data(backend: str) -> None:
    codec = Codec(4, 2, backend=backend)
    whole = blocks(codec, 64)
    wanted = {0: np.zeros(64, np.uint8)}
    with pytest.raises(ValueError, match=r"at least 4 of 6 blocks .* got 3; blocks \[0, 2, 5\] are lost"):
        codec.decode({i: whole[i] for i in (1, 3, 4)}, wanted)
    assert not wanted[0].any()


@pytest.mark.parametrize("backend", HERE)
def test_a_swapped_or_flipped_block_decodes_to_other_bytes_and_the_hash_says_so(backend: str) -> None:
    codec = Codec(4, 2, backend=backend)
    whole = blocks(codec, 256)
    swapped = {0: whole[1], 1: whole[0], 3: whole[3], 5: whole[5]}  # parity 4 is a XOR: it cannot tell a swap
    flipped = whole[3].copy()
    flipped[100] ^= 1
    for present in (swapped, {0: whole[0], 1: whole[1], 3: flipped, 5: whole[5]}):
        out = np.zeros(256, np.uint8)
        codec.decode(present, {2: out})
        assert crc32c(out) != crc32c(whole[2])


def test_any_buffer_works_and_more_blocks_than_needed_too() -> None:
    codec = Codec(2, 1)
    data = [b"holdfast", memoryview(b"trains..")]
    parity = bytearray(8)
    codec.encode(data, [parity])
    assert parity == bytes(a ^ b for a, b in zip(*data, strict=True))
    out = np.zeros((2, 2), np.uint16)
    codec.decode({0: data[0], 1: data[1], 2: parity}, {1: out})
    assert out.tobytes() == b"trains.."
    codec.decode({0: data[0], 2: parity}, {})


def test_no_parity_is_a_code_too() -> None:
    codec = Codec(3, 0)
    codec.encode([b"ab", b"cd", b"ef"], [])
    with pytest.raises(ValueError, match="lost"):
        codec.decode({0: b"ab", 1: b"cd"}, {2: bytearray(2)})


def test_wrong_buffers_are_refused() -> None:
    codec = Codec(2, 1)
    with pytest.raises(ValueError, match="one length"):
        codec.encode([b"ab", b"abc"], [bytearray(2)])
    with pytest.raises(ValueError, match="writable"):
        codec.encode([b"ab", b"cd"], [b"ef"])
    with pytest.raises(ValueError, match="2 data and 1 parity"):
        codec.encode([b"ab"], [bytearray(2)])
    with pytest.raises(ValueError, match="contiguous"):
        codec.encode([np.zeros(8, np.uint8)[::2]] * 2, [bytearray(4)])
    with pytest.raises(ValueError, match=r"indices must be in 0\.\.2"):
        codec.decode({0: b"ab", 3: b"ab"}, {})
    for k, m in ((0, 1), (1, -1), (200, 56)):
        with pytest.raises(ValueError, match="k \\+ m <= 255"):
            Codec(k, m)


def test_lengths_beyond_one_call_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "_CUT_BYTES", 100)
    for m in (1, 2):
        codec = Codec(4, m)
        whole = blocks(codec, 1023)
        assert all(map(np.array_equal, whole, blocks(Codec(4, m, backend="numpy"), 1023)))
        lose_and_decode(codec, whole, tuple(range(m)))
    assert crc32c(whole[0]) == crc.crc32c(whole[0])


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CODEC", "numpy")
    assert Codec(2, 1).backend == "numpy"
    monkeypatch.setenv("HOLDFAST_CODEC", "fast")
    with pytest.raises(ValueError, match="one of isa-l, numpy, got 'fast'"):
        Codec(2, 1)
    monkeypatch.delenv("HOLDFAST_CODEC")
    assert Codec(2, 1).backend == HERE[0]


def test_without_a_library_numpy_is_used_and_the_reason_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    isal.load.cache_clear()
    monkeypatch.setattr(isal, "_candidates", lambda: iter(["/nowhere/libisal.so"]))
    try:
        assert choose()[0] == "numpy"
        assert "/nowhere/libisal.so" in choose()[1]
        with pytest.raises(ValueError, match="install pyeclib"):
            choose("isa-l")
    finally:
        isal.load.cache_clear()


@pytest.mark.skipif("isa-l" not in HERE, reason="ISA-L is not on this machine")
def test_a_library_that_miscounts_is_not_believed() -> None:
    library = isal.load()[0]
    assert library is not None and isal.self_test(library) is None

    class Wrong(isal.Isal):
        def combine(self, matrix, sources, outputs) -> None:
            super().combine(matrix, sources, outputs)
            outputs[0][-1] ^= 1

    assert "differently" in str(isal.self_test(Wrong(library.path)))


@pytest.mark.parametrize("backend", HERE)
def test_crc32c_known_answers_and_chaining(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CODEC", backend)
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(1).integers(0, 256, 10_001, np.uint8)
    for cut in (0, 1, 4096, 10_001):
        assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


@pytest.mark.skipif(len(HERE) < 2, reason="ISA-L is not on this machine")
@given(length=st.integers(0, 20_000), offset=st.integers(0, 7), seed=st.integers(0, 2**32 - 1))
def test_crc32c_of_both_backends_agree(length: int, offset: int, seed: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length + offset, np.uint8)[offset:]
    library = isal.load()[0]
    assert library is not None
    assert library.crc32c(data, seed) == crc.crc32c(data, seed)


def test_the_generator_is_mds_and_the_field_is_a_field() -> None:
    values = np.arange(1, 256)
    assert (gf256.MUL[values, gf256.INV[values]] == 1).all()
    assert (gf256.MUL == gf256.MUL.T).all()
    matrix = gf256.generator(6, 4)
    for size in range(1, 5):
        for rows in combinations(range(4), size):
            for columns in combinations(range(6), size):
                part = matrix[np.ix_(rows, columns)]
                assert np.array_equal(gf256.matmul(gf256.inverse(part), part), np.eye(size, dtype=np.uint8))
    with pytest.raises(ValueError, match="singular"):
        gf256.inverse(np.ones((2, 2), np.uint8))


@pytest.mark.skipif("isa-l" not in HERE, reason="ISA-L is not on this machine")
def test_threads_may_share_a_codec() -> None:
    codec = Codec(6, 3)
    whole, faults = blocks(codec, 50_000), []

    def work(lost: int) -> None:
        try:
            for _ in range(20):
                lose_and_decode(codec, whole, (lost, lost + 1, lost + 2))
        except AssertionError as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_as_bytes_shares_memory() -> None:
    store = bytearray(4)
    as_bytes(store)[2] = 7
    assert store == b"\x00\x00\x07\x00"
