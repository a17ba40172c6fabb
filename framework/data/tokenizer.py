"""Tokenizers: text to token ids and back.

    bytes                 256 ids, one for each byte of UTF-8; needs no file, no library and no training
    a path                a local `tokenizer.json` (or the folder that holds one), read by the `tokenizers` library

Nothing is ever downloaded. A tokenizer's `fingerprint` depends on its content only, so it is the same on every node.

Rule of this file: it knows no data, model or cache. The library is imported when a `tokenizer.json` is opened.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What data and text generation need. `end_of_text` is the id put after each document, None where there is none."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> Tokens: ...
    def encode_all(self, texts: list[str]) -> list[Tokens]: ...
    def decode(self, tokens: Tokens) -> str: ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One token for each byte. A document ends with byte 0, which text does not contain."""

    vocab_size: int = 256
    end_of_text: int | None = 0
    fingerprint: str = "bytes"

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def encode_all(self, texts: list[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tokens) -> str:
        return bytes(t for t in tokens.tolist() if t < 256).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class JsonTokenizer:
    """A `tokenizer.json`, whatever model it holds. Special tokens are not added when encoding."""

    backend: Any
    vocab_size: int
    end_of_text: int | None
    fingerprint: str

    def encode(self, text: str) -> Tokens:
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_all(self, texts: list[str]) -> list[Tokens]:
        """The same, on all cores."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Tokens) -> str:
        known = [t for t in tokens.tolist() if t < self.vocab_size]
        return str(self.backend.decode(known, skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class NumberTokenizer:
    """For tokens whose tokenizer is not at hand: text is their numbers."""

    vocab_size: int
    end_of_text: int | None = None
    fingerprint: str = "numbers"

    def encode(self, text: str) -> Tokens:
        return np.array([int(word) % self.vocab_size for word in text.split() if word.isdigit()], dtype=np.int64)

    def encode_all(self, texts: list[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tokens) -> str:
        return " ".join(map(str, tokens.tolist()))


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer of a path.

    Raises ValueError where there is no such file, it is not a tokenizer, or the library is missing.
    """
    return ByteTokenizer() if name == "bytes" else _open_json(name)


def _open_json(name: str) -> JsonTokenizer:
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer: must be `bytes` or a local tokenizer.json (or its folder), got {name!r}; "
            f"there is no file {path}"
        )
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer: the library `tokenizers` must be installed to read {name!r}; "
            "pip install tokenizers, or use data.tokenizer=bytes"
        ) from error
    content = path.read_bytes()
    try:
        backend = Backend.from_str(content.decode())
    except Exception as error:  # the library raises bare `Exception`
        raise ValueError(f"data.tokenizer: must be a valid tokenizer.json, got {name!r}; {error}") from error
    # Truncation and padding, which some published files carry, would cut or lengthen documents.
    backend.no_truncation()
    backend.no_padding()
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    end = next((vocab[token] for token in END_OF_TEXT_NAMES if token in vocab), None)
    return JsonTokenizer(backend, max(vocab.values()) + 1, end, hashlib.sha256(_canonical(content)).hexdigest()[:16])


def _canonical(content: bytes) -> bytes:
    """The same bytes for files that differ in white space or in the order of keys only."""
    return json.dumps(json.loads(content), sort_keys=True, separators=(",", ":")).encode()
