"""Megatron-LM's files are read, as its published format lays them out."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.indexed_tokens import open_indexed
from framework.data.samples import build, vocab_size

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write(
    prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16", *, order: list[int] | None = None
) -> None:
    """Documents of sequences of tokens, laid out by hand; `order` is that of the sequences in the .bin file."""
    sequences = [np.array(s, dtype=dtype) for document in documents for s in document]
    offsets, at, body = [0] * len(sequences), 0, b""
    for i in order if order is not None else range(len(sequences)):
        offsets[i] = at
        body += sequences[i].tobytes()
        at += sequences[i].nbytes
    bounds = np.cumsum([0] + [len(document) for document in documents])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    lengths = np.array([len(s) for s in sequences], "<i4").tobytes()
    index = head + lengths + np.array(offsets, "<i8").tobytes() + bounds.astype("<i8").tobytes()
    prefix.with_suffix(".bin").write_bytes(body)
    prefix.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16"])
@pytest.mark.parametrize("order", [None, [3, 0, 2, 1]])
def test_every_range_is_read_from_every_type_and_order(dtype: str, order: list[int] | None, tmp_path: Path) -> None:
    write(tmp_path / "d", [[[1, 2, 3], []], [[4, 5, 6, 7]], [[100]]], dtype, order=order)
    found = open_indexed(str(tmp_path / "d"))
    stream = [1, 2, 3, 4, 5, 6, 7, 100]
    assert len(found) == 8 and found.num_documents == 3
    for start in range(9):
        for stop in range(start, 9):
            assert found.read(start, stop).tolist() == stream[start:stop]
            assert found.read(start, stop).dtype == np.int64


@settings(max_examples=settings.default.max_examples // 3)
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=4), max_size=9), st.data())
def test_any_documents_are_read(documents: list[list[list[int]]], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder) / "d", documents)
        found = open_indexed(folder + "/d.idx")
        stream = [token for document in documents for sequence in document for token in sequence]
        start = data.draw(st.integers(0, len(stream)))
        stop = data.draw(st.integers(start, len(stream)))
        assert len(found) == len(stream) and found.read(start, stop).tolist() == stream[start:stop]


def test_it_is_a_source_like_any_other(tmp_path: Path) -> None:
    tokens = list(range(1000))
    write(tmp_path / "d", [[tokens[:300]], [tokens[300:]]])
    values = {
        "kind": "megatron",
        "path": str(tmp_path / "d.bin"),
        "seq_len": 9,
        "vocab_size": 1000,
        "val_fraction": 0.1,
    }
    data = build(values, seed=0)
    assert data.vocab_size == vocab_size(values) == 1000
    seen = sorted(tuple(data.train(i).tolist()) for i in range(data.num_train))
    assert seen == [tuple(range(9 * i, 9 * i + 10)) for i in range(data.num_train)]
    assert data.decode(np.array([7, 8])) == "7 8" and data.encode("7 8").tolist() == [7, 8]


def test_a_vocabulary_that_is_too_small_is_found_when_it_matters(tmp_path: Path) -> None:
    write(tmp_path / "d", [[[1, 2, 300, 4] * 9]])
    data = build({"kind": "megatron", "path": str(tmp_path / "d"), "seq_len": 4}, seed=0)
    with pytest.raises(ValueError, match=r"data.vocab_size: every token of .* must be in \[0, 256\), got 300"):
        data.train(0)


def test_the_digest_follows_index_and_tokens(tmp_path: Path) -> None:
    def digest(documents: list[list[list[int]]]) -> str:
        write(tmp_path / "d", documents)
        return open_indexed(str(tmp_path / "d")).digest

    seen = [digest([[[1, 2, 3]]]), digest([[[1, 2, 4]]]), digest([[[1, 2], [3]]]), digest([[[1, 2]], [[3]]])]
    assert len(set(seen)) == 4 and digest([[[1, 2, 3]]]) == seen[0]


def test_what_is_no_such_pair_is_refused(tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    with pytest.raises(ValueError, match=r"data.path: no such file or folder, got .*d.idx is missing"):
        open_indexed(prefix)
    write(tmp_path / "d", [[[1, 2, 3]]])
    index = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(index[:-20])
    with pytest.raises(ValueError, match="must hold 1 sequences, got only"):
        open_indexed(prefix)
    (tmp_path / "d.idx").write_bytes(b"PK" + index[2:])
    with pytest.raises(ValueError, match="must be a Megatron index of version 1"):
        open_indexed(prefix)
    (tmp_path / "d.idx").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a Megatron index of version 1"):
        open_indexed(prefix)
    write(tmp_path / "d", [[[1, 2, 3]]], "float32")
    with pytest.raises(ValueError, match="must hold integer tokens, got float32"):
        open_indexed(prefix)
    write(tmp_path / "d", [[[1, 2, 3]]])
    (tmp_path / "d.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="d.bin must reach 6 bytes, as its index says, got 4"):
        open_indexed(prefix)
