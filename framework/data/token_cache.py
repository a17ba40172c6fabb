"""Token cache: a corpus as one flat file of token ids, made once per machine and mapped into memory by everyone.

    <cache_dir>/<key>/tokens.bin     ids, little-endian, the smallest unsigned type that holds the vocabulary
    <cache_dir>/<key>/tokens.json    how many, of which type, the digest of their bytes
    <cache_dir>/<key>.lock           held (flock) by the one process that builds

The folder is built under another name and renamed when complete and on disk, so it is there whole or not at all;
a killed builder's leftover is removed by the next one. Whoever waits for the lock finds the folder ready.

Rule of this file: it knows neither samples nor seeds. No pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from framework.data.corpus import Passage
from framework.data.tokenizer import ByteTokenizer, Tokenizer, Tokens

FORMAT = 1
_BATCH = 256  # passages that are tokenized together


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A flat file of tokens, mapped read-only. `digest` is that of their values, equal on every machine."""

    tokens: NDArray[np.unsignedinteger]
    num_documents: int
    digest: str

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop)."""
        return self.tokens[start:stop].astype(np.int64)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/holdfast`, or `~/.cache/holdfast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"


def cached_tokens(
    signature: str, passages: Callable[[], Iterator[Passage]], tokenizer: Tokenizer, *, cache_dir: Path
) -> TokenFile:
    """The tokens of `passages()`, which is called only if no intact cache for this signature and tokenizer exists.

    Safe to call from many processes at once. Raises ValueError where the folder cannot be written, and whatever
    `passages` raises.
    """
    key = hashlib.sha256(f"{FORMAT} {signature} {tokenizer.fingerprint} {sys.byteorder}".encode()).hexdigest()[:24]
    folder = cache_dir / key
    found = _open(folder)
    if found is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(cache_dir / f"{key}.lock"):
                found = _open(folder) or _build(folder, passages(), tokenizer)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir: must be a folder that can be written, got {str(cache_dir)!r}; {error}"
            ) from error
    return found


def _open(folder: Path) -> TokenFile | None:
    """The cache, or None where it is missing or not of the length it claims."""
    try:
        facts = json.loads((folder / "tokens.json").read_text())
        dtype, count = np.dtype(facts["dtype"]), int(facts["num_tokens"])
        if (folder / "tokens.bin").stat().st_size != count * dtype.itemsize:
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
        return TokenFile(tokens, facts["num_documents"], facts["digest"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None


def _build(folder: Path, passages: Iterator[Passage], tokenizer: Tokenizer) -> TokenFile:
    for leftover in (folder, *folder.parent.glob(f".{folder.name}.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    draft = folder.parent / f".{folder.name}.{os.getpid()}"
    draft.mkdir()
    try:
        with (draft / "tokens.bin").open("wb") as file:
            facts = _write(file, passages, tokenizer)
            _to_disk(file)
        with (draft / "tokens.json").open("wb") as file:
            file.write(json.dumps(facts).encode())
            _to_disk(file)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    built = _open(folder)
    if built is None:
        raise OSError(f"{folder} is not what was just written")
    return built


def _write(file: BinaryIO, passages: Iterator[Passage], tokenizer: Tokenizer) -> dict[str, object]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    digest = hashlib.sha256(dtype.str.encode())
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype)
    num_tokens = num_documents = 0
    for tokens, ends in _tokenized(passages, tokenizer):
        for part in (tokens.astype(dtype), end) if ends else (tokens.astype(dtype),):
            file.write(part.data)
            digest.update(part.data)
            num_tokens += len(part)
        num_documents += ends
    return {"dtype": dtype.str, "num_tokens": num_tokens, "num_documents": num_documents, "digest": digest.hexdigest()}


def _tokenized(passages: Iterator[Passage], tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.integer], bool]]:
    if isinstance(tokenizer, ByteTokenizer):
        yield from ((np.frombuffer(p.text, np.uint8), p.ends) for p in passages)
        return
    for batch in _batches(passages):
        encoded = tokenizer.encode_all([p.text.decode(errors="replace") for p in batch])
        yield from zip(encoded, (p.ends for p in batch), strict=True)


def _batches(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    """Up to `_BATCH` passages, fewer where they are long."""
    batch: list[Passage] = []
    for passage in passages:
        batch.append(passage)
        if len(batch) == _BATCH or sum(len(p.text) for p in batch) > 1 << 24:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
