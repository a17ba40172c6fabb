"""Corpus: the documents behind a source, one after the other, always in the same order.

    source -> files, sorted by a hash of their relative names -> passages (a document, or a part of a long one)

Files are ordered by a hash of their names because the end of the stream is held out: so the held-out part is a fair
draw of files, not the last ones of the alphabet, and it is the same on every machine.

Rule of this file: it reads text and knows no tokens. pyarrow and datasets are imported when a source needs them.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from framework.data.sources import HuggingfaceSource, JsonlSource, ParquetSource, Source, StdlibSource, TextSource

PASSAGE_BYTES = 1 << 24  # longer files are read in parts, cut after a line
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz", ".json", ".ndjson"), "parquet": (".parquet",)}


class Passage(NamedTuple):
    """UTF-8 text; `ends` says whether it is the end of its document."""

    text: bytes
    ends: bool = True


def files(source: Source) -> list[tuple[str, Path]]:
    """(relative name, path) of every file of a stdlib, text, jsonl or parquet source, in the order they are read.

    Raises ValueError where there is none.
    """
    if isinstance(source, StdlibSource):
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for p in _below(root, NOT_STDLIB) if p.suffix == ".py"]
    elif isinstance(source, TextSource):
        root, found = _named(source)
    else:
        raise TypeError(f"corpus: a {source.kind} source has no files")
    named = [(p.relative_to(root).as_posix(), p) for p in found]
    return sorted(named, key=lambda pair: (hashlib.blake2b(pair[0].encode()).digest(), pair[0]))


def signature(source: Source) -> str:
    """Changes when the files (names, sizes, times) or the way to read them do; cheap, it reads no content."""
    if isinstance(source, HuggingfaceSource):
        facts: list[object] = [source.path, source.name, source.split, source.revision, source.text_key]
        local = Path(source.path).expanduser()
        facts += [_stat(p) for p in sorted(_below(local))] if local.is_dir() else []
    else:
        facts = [source.kind, getattr(source, "text_key", None)]
        facts += [sys.version] if isinstance(source, StdlibSource) else []
        facts += [(name, *_stat(path)) for name, path in files(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def passages(source: Source) -> Iterator[Passage]:
    """All text of a source, in its order. Raises ValueError for what cannot be read, with file and line."""
    if isinstance(source, HuggingfaceSource):
        yield from map(Passage, _huggingface(source))
        return
    for name, path in files(source):
        try:
            yield from _of_file(source, name, path)
        except OSError as error:
            raise ValueError(f"data.path: {name} must be readable, got {error}; mend or remove it") from error


def _of_file(source: Source, name: str, path: Path) -> Iterator[Passage]:
    if isinstance(source, ParquetSource):
        return map(Passage, _parquet(path, name, source.text_key))
    if isinstance(source, JsonlSource):
        return map(Passage, _jsonl(path, name, source.text_key))
    return _text(path)


def _named(source: TextSource) -> tuple[Path, list[Path]]:
    path = Path(source.path).expanduser()
    if path.is_file():
        return path.parent, [path]
    suffixes = _SUFFIXES.get(source.kind)
    if path.is_dir():
        below = [p for p in _below(path) if (p.name.endswith(suffixes) if suffixes else not _binary(p))]
        if not below:
            kinds = " or ".join(suffixes) if suffixes else "text"
            raise ValueError(f"data.path: must hold {kinds} files, got {source.path!r}; it has none, at any depth")
        return path, below
    found = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207  (Path.glob refuses absolute ones)
    matches = [p for p in found if p.is_file()]
    if not matches:
        raise ValueError(
            f"data.path: no such file or folder, got {source.path!r}; "
            f"give a file, a folder or a glob (relative paths start at {Path.cwd()})"
        )
    return Path(os.path.commonpath([p.parent for p in matches])), matches


def _below(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files at any depth, without hidden ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _text(path: Path) -> Iterator[Passage]:
    with path.open("rb") as file:
        part = file.read(PASSAGE_BYTES)
        while part:
            part += file.readline() if len(part) == PASSAGE_BYTES and not part.endswith(b"\n") else b""
            following = file.read(PASSAGE_BYTES)
            yield Passage(part, ends=not following)
            part = following


def _jsonl(path: Path, name: str, text_key: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _field(line, f"{name} line {number}", text_key)


def _field(line: bytes, where: str, text_key: str) -> bytes:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data.path: {where} must be a JSON object, got {line[:60]!r}; {error}") from error
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise _no_text(f"{where} must have text under {text_key!r}, got {has}")
    return text.encode(errors="replace")


def _parquet(path: Path, name: str, text_key: str) -> Iterator[bytes]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "data.kind: parquet needs the library pyarrow, got no such module; pip install pyarrow"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.path: {name} must be a Parquet file, got something else; {error}") from error
    with file:
        if text_key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise _no_text(f"{name} must have the column {text_key!r}, got {names}")
        for batch in file.iter_batches(columns=[text_key]):
            yield from _encoded(batch.column(0).to_pylist(), text_key)


def _huggingface(source: HuggingfaceSource) -> Iterator[bytes]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data.kind: huggingface needs the library datasets, got no such module; pip install 'holdfast[hf]'"
        ) from error
    local = Path(source.path).expanduser()
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data.path: must be a data set that can be loaded, got {source.path!r}; {reason}") from error
    if source.text_key not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise _no_text(f"the data set must have the column {source.text_key!r}, got {names}")
    yield from _encoded((row[source.text_key] for row in rows.select_columns([source.text_key])), source.text_key)


def _encoded(values: Iterable[object], text_key: str) -> Iterator[bytes]:
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise _no_text(f"column {text_key!r} must hold text, got {type(value).__name__}")
        yield value.encode(errors="replace")


def _no_text(what: str) -> ValueError:
    return ValueError(f"data.text_key: {what}; set data.text_key to where the text is")
