"""A corpus is tokenized once per machine, and a half-written cache is never seen."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from framework.data.corpus import Passage
from framework.data.token_cache import cached_tokens, default_cache_dir
from framework.data.tokenizer import ByteTokenizer, NumberTokenizer

TEXTS = [b"one", b"two and a half", b"three"]


def say(log: Path | None = None, *, pause_s: float = 0.0) -> Callable[[], Iterator[Passage]]:
    def passages() -> Iterator[Passage]:
        if log is not None:
            with log.open("a") as file:
                file.write("read\n")
        for text in TEXTS:
            time.sleep(pause_s)
            yield Passage(text)

    return passages


def test_documents_lie_in_a_row_each_with_its_end(tmp_path: Path) -> None:
    found = cached_tokens("s", say(), ByteTokenizer(), cache_dir=tmp_path)
    text = b"one\0two and a half\0three\0"
    assert found.tokens.tobytes() == text and len(found) == len(text) and found.num_documents == 3
    assert found.read(2, 5).tolist() == list(text[2:5]) and found.read(2, 5).dtype == np.int64


def test_parts_of_a_document_are_not_parted(tmp_path: Path) -> None:
    parts = [Passage(b"ab", ends=False), Passage(b"cd")]
    found = cached_tokens("s", lambda: iter(parts), ByteTokenizer(), cache_dir=tmp_path)
    assert found.tokens.tobytes() == b"abcd\0" and found.num_documents == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_ids_take_the_smallest_type(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    passages = [Passage(b"1 2"), Passage(str(vocab_size - 1).encode())]
    found = cached_tokens("s", lambda: iter(passages), NumberTokenizer(vocab_size), cache_dir=tmp_path)
    assert found.tokens.dtype == np.dtype(dtype) and found.tokens.tolist() == [1, 2, vocab_size - 1]


def test_the_second_time_nothing_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = cached_tokens("s", say(log), ByteTokenizer(), cache_dir=tmp_path)
    again = cached_tokens("s", say(log), ByteTokenizer(), cache_dir=tmp_path)
    assert log.read_text() == "read\n" and again.digest == first.digest
    cached_tokens("other", say(log), ByteTokenizer(), cache_dir=tmp_path)
    cached_tokens("s", say(log), NumberTokenizer(9), cache_dir=tmp_path)
    assert log.read_text() == "read\n" * 3


def test_many_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build, args=(tmp_path, 0.1)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert (tmp_path / "log").read_text() == "read\n"


def test_a_killed_builder_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_build, args=(tmp_path, 5.0))
    worker.start()
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob(".*/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    assert list(tmp_path.glob(".*/tokens.bin")) and not list(tmp_path.glob("[!.]*/tokens.bin"))
    assert len(cached_tokens("s", say(), ByteTokenizer(), cache_dir=tmp_path)) == 25
    assert not list(tmp_path.glob(".*"))


def test_a_cut_or_broken_cache_is_made_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    digest = cached_tokens("s", say(log), ByteTokenizer(), cache_dir=tmp_path).digest
    (file,) = tmp_path.glob("*/tokens.bin")
    os.truncate(file, 5)
    assert cached_tokens("s", say(log), ByteTokenizer(), cache_dir=tmp_path).digest == digest
    (facts,) = tmp_path.glob("*/tokens.json")
    facts.write_text(json.dumps({"dtype": "|u1"}))
    assert cached_tokens("s", say(log), ByteTokenizer(), cache_dir=tmp_path).digest == digest
    assert log.read_text() == "read\n" * 3


def test_an_error_of_the_corpus_leaves_no_draft(tmp_path: Path) -> None:
    def broken() -> Iterator[Passage]:
        yield Passage(b"one")
        raise ValueError("data.path: line 2 ...")

    with pytest.raises(ValueError, match="line 2"):
        cached_tokens("s", broken, ByteTokenizer(), cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache_dir: must be a folder that can be written, got .*file"):
        cached_tokens("s", say(), ByteTokenizer(), cache_dir=tmp_path / "file")


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/holdfast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "holdfast"


def _build(cache_dir: Path, pause_s: float) -> None:
    found = cached_tokens("s", say(cache_dir / "log", pause_s=pause_s), ByteTokenizer(), cache_dir=cache_dir)
    assert len(found) == 25
