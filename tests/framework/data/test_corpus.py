"""The documents of every kind of source come whole, in an order that depends on names only."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from framework.data import corpus
from framework.data.sources import decode


def documents(**values: Any) -> list[bytes]:
    found, parts = [], []
    for passage in corpus.passages(decode({"seq_len": 8, **values})):
        parts.append(passage.text)
        if passage.ends:
            found.append(b"".join(parts))
            parts = []
    assert not parts, "the last passage must end its document"
    return found


def make(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_the_standard_library_is_found_without_its_tests() -> None:
    source = decode({"kind": "stdlib", "seq_len": 8})
    names = [name for name, _ in corpus.files(source)]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert 5e6 < sum(path.stat().st_size for _, path in corpus.files(source)) < 5e7
    assert names != sorted(names) and names == [name for name, _ in corpus.files(source)]


def test_a_folder_is_read_at_any_depth_without_hidden_and_binary_files(tmp_path: Path) -> None:
    make(
        tmp_path,
        {"a.txt": b"one", "deep/er/b.md": b"two", ".git/c": b"x", ".hidden": b"x", "p.png": b"\x89\0\0", "e": b""},
    )
    assert sorted(documents(kind="text", path=str(tmp_path))) == [b"one", b"two"]


def test_a_glob_and_a_file_name_files(tmp_path: Path) -> None:
    make(tmp_path, {"a/1.txt": b"one", "b/2.txt": b"two", "b/3.log": b"x"})
    assert sorted(documents(kind="text", path=f"{tmp_path}/**/*.txt")) == [b"one", b"two"]
    assert documents(kind="text", path=f"{tmp_path}/b/3.log") == [b"x"]


def test_the_order_depends_on_relative_names_only(tmp_path: Path) -> None:
    content = {f"{i}.txt": str(i).encode() for i in range(20)}
    make(tmp_path / "x", content)
    make(tmp_path / "y" / "z", dict(reversed(content.items())))
    first = documents(kind="text", path=str(tmp_path / "x"))
    assert first == documents(kind="text", path=str(tmp_path / "y" / "z"))
    assert first != sorted(first, key=int), "the held-out end must be a fair draw of the files"


def test_a_long_file_comes_in_parts_that_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PASSAGE_BYTES", 10)
    for text in (b"0123456789\n" * 5, b"0123456789", b"abc\n" * 9 + b"end", b"no line end at all, and long"):
        make(tmp_path, {"long.txt": text})
        source = decode({"kind": "text", "seq_len": 8, "path": str(tmp_path / "long.txt")})
        passages = list(corpus.passages(source))
        assert b"".join(p.text for p in passages) == text
        assert [p.ends for p in passages] == [False] * (len(passages) - 1) + [True]
        assert all(p.text.endswith(b"\n") for p in passages[:-1])


def test_json_lines_are_read_plain_and_compressed(tmp_path: Path) -> None:
    rows = [{"body": "grün", "n": 1}, {"body": "two\nlines"}]
    make(tmp_path, {"a.jsonl": "\n\n".join(json.dumps(row) for row in rows).encode()})
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(b'{"body": "three"}\n')
    found = documents(kind="jsonl", path=str(tmp_path), text_key="body")
    assert sorted(found) == sorted(["grün".encode(), b"two\nlines", b"three"])


def test_broken_json_lines_are_named(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": b'{"text": "x"}\n{"text": 1}\n', "b.jsonl": b"{\n", "c.jsonl": b"[1]\n"})
    with pytest.raises(ValueError, match="data.text_key: a.jsonl line 2 must have text under 'text', got text"):
        documents(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="data.path: b.jsonl line 1 must be a JSON object, got b'{"):
        documents(kind="jsonl", path=str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="data.text_key: c.jsonl line 1 .* got list"):
        documents(kind="jsonl", path=str(tmp_path / "c.jsonl"))


@pytest.mark.slow
def test_parquet_columns_are_read(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "zwei ß"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(kind="parquet", path=str(tmp_path)) == [b"one", "zwei ß".encode()]
    with pytest.raises(ValueError, match="data.text_key: a.parquet must have the column 'body', got text, n"):
        documents(kind="parquet", path=str(tmp_path), text_key="body")
    with pytest.raises(ValueError, match="data.text_key: column 'n' must hold text, got int"):
        documents(kind="parquet", path=str(tmp_path), text_key="n")
    make(tmp_path, {"a.parquet": b"not parquet at all"})
    with pytest.raises(ValueError, match=r"data.path: a.parquet must be a Parquet file"):
        documents(kind="parquet", path=str(tmp_path))


@pytest.mark.slow
def test_hugging_face_data_sets_are_read_from_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "d"))
    assert documents(kind="huggingface", path=str(tmp_path / "d")) == [b"one", b"two"]
    with pytest.raises(ValueError, match="data.text_key: the data set must have the column 'body', got text"):
        documents(kind="huggingface", path=str(tmp_path / "d"), text_key="body")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data.path: must be a data set that can be loaded, got"):
        documents(kind="huggingface", path=str(tmp_path / "empty"))


@pytest.mark.parametrize(("kind", "module"), [("parquet", "pyarrow.parquet"), ("huggingface", "datasets")])
def test_a_missing_library_is_explained(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"a.parquet": b""})
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=f"data.kind: {kind} needs the library .*pip install"):
        documents(kind=kind, path=str(tmp_path))


def test_a_missing_path_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.path: no such file or folder, got 'nowhere/\*.txt'; give a file, a folder"
    ):
        documents(kind="text", path="nowhere/*.txt")
    with pytest.raises(ValueError, match=r"data.path: must hold .jsonl or .* files, got"):
        documents(kind="jsonl", path=str(tmp_path))


def test_the_signature_follows_files_and_how_they_are_read(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": b'{"text": "x"}\n'})

    def now(**values: Any) -> str:
        return corpus.signature(decode({"kind": "jsonl", "seq_len": 8, "path": str(tmp_path), **values}))

    seen = [now(), now(text_key="body")]
    assert now() == seen[0]
    make(tmp_path, {"a.jsonl": b'{"text": "xy"}\n'})
    seen.append(now())
    make(tmp_path, {"b.jsonl": b""})
    seen.append(now())
    assert len(set(seen)) == len(seen)
