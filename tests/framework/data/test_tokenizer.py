"""Tokenizers give text back, say what ends a document, and refuse what they cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.tokenizer import open_tokenizer

TEXT = "def area(r):\n    return 3.14 * r * r\n"


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([TEXT] * 9, trainer)
    trained.enable_truncation(5)
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@given(st.text())
def test_bytes_give_any_text_back(text: str) -> None:
    tokenizer = open_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens.dtype == np.int64 and (tokens.max(initial=0) < tokenizer.vocab_size)


def test_bytes_decode_what_a_model_invents() -> None:
    assert open_tokenizer("bytes").decode(np.array([72, 255, 105, 300])) == "H\ufffdi"


def test_a_tokenizer_json_is_read_from_its_file_or_folder(tokenizer_json: Path) -> None:
    tokenizer = open_tokenizer(str(tokenizer_json))
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT, "the file's truncation must not apply"
    assert len(tokens) < len(TEXT) and tokens.dtype == np.int64
    assert tokenizer.end_of_text == 0 and tokenizer.vocab_size > 256
    assert open_tokenizer(str(tokenizer_json.parent)).fingerprint == tokenizer.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_spelling(tokenizer_json: Path) -> None:
    before = open_tokenizer(str(tokenizer_json)).fingerprint
    content = json.loads(tokenizer_json.read_text())
    tokenizer_json.write_text(json.dumps(content, indent=7))
    assert open_tokenizer(str(tokenizer_json)).fingerprint == before
    content["added_tokens"][0]["lstrip"] = True
    tokenizer_json.write_text(json.dumps(content))
    assert open_tokenizer(str(tokenizer_json)).fingerprint != before


def test_a_missing_or_broken_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.tokenizer: must be `bytes` or a local tokenizer.json.*there is no file"
    ):
        open_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="data.tokenizer: must be a valid tokenizer.json"):
        open_tokenizer(str(tmp_path))
