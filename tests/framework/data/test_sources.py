"""Plain values become exactly one source, or an error that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.data.sources import KINDS, MixtureSource, TextSource, decode, encode

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
MIXTURE: dict[str, Any] = {
    "kind": "mixture",
    "seq_len": 64,
    "cache_dir": "/c",
    "sources": [{"kind": "text", "path": "a", "weight": 3}, {"kind": "jsonl", "path": "b", "text_key": "body"}],
}


def test_parts_of_a_mixture_take_what_is_common_from_it() -> None:
    mixture = decode(MIXTURE)
    assert isinstance(mixture, MixtureSource)
    assert [part.weight for part in mixture.sources] == [3.0, 1.0]
    assert mixture.sources[0].source == TextSource(seq_len=64, cache_dir="/c", path="a")
    assert mixture.sources[1].source.cache_dir == "/c"


def test_encode_is_the_inverse_of_decode() -> None:
    samples = [
        MIXTURE,
        {"kind": "synthetic", "seq_len": 8, "noise": 0.5},
        {"kind": "megatron", "seq_len": 8, "path": "x"},
    ]
    for values in samples:
        assert decode(encode(decode(values))) == decode(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "txt"}, "data.kind: must be one of stdlib, text, .*, got 'txt'"),
        ({"kind": "text", "seq_len": 8}, "data.path: must be given"),
        ({"kind": "text", "seq_len": 8, "pth": "a"}, r"data.pth: no such key; did you mean data.path\?"),
        ({"kind": "text", "seq_len": "8", "path": "a"}, "data.seq_len: must be a positive integer, got '8'"),
        ({"kind": "text", "seq_len": 8, "path": ""}, "data.path: must be not empty, got ''"),
        ({"kind": "stdlib", "seq_len": 8, "val_fraction": 1.0}, "data.val_fraction: .*, got 1.0"),
        ({"kind": "synthetic", "seq_len": 8, "vocab_size": 1}, "data.vocab_size: .*, got 1"),
        ({"kind": "mixture", "seq_len": 8, "sources": []}, r"data.sources: must list the parts, got \[\]"),
        ({"kind": "mixture", "seq_len": 8, "sources": ["a"]}, r"data.sources\[0\]: must be a group of keys, got 'a'"),
        (
            {"kind": "mixture", "seq_len": 8, "sources": [{"kind": "stdlib", "seq_len": 4}]},
            r"data.sources\[0\].seq_len: must be set for the mixture",
        ),
        (
            {"kind": "mixture", "seq_len": 8, "sources": [{"kind": "stdlib"}, {"kind": "stdlib", "weight": 0}]},
            r"data.sources\[1\].weight: must be a positive number, got 0",
        ),
        (
            {"kind": "mixture", "seq_len": 8, "sources": [{"kind": "text"}]},
            r"data.sources\[0\].path: must be given",
        ),
    ],
)
def test_wrong_values_are_refused_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(values)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_kind_has_its_yaml_and_every_yaml_a_kind(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert values["kind"] == name
    if "path" in values:
        assert values["path"] is None, "a path is the user's to give"
        values["path"] = "corpus"
    if name == "mixture":
        values["sources"] = [{"kind": "stdlib"}]
    assert decode(values).kind == name
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)
