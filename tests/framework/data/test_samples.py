"""Samples of every kind: held-out data apart, epochs without end, mixtures in proportion, all of it pure functions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.mixture import MAX_PATTERN, Pattern
from framework.data.samples import build, vocab_size
from framework.data.sources import decode
from framework.data.synthetic import SyntheticData
from framework.data.windows import Data

TEXT = bytes(range(1, 250)) * 8


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_bytes(TEXT)
    return {"kind": "text", "path": str(tmp_path / "a.txt"), "seq_len": 10, "cache_dir": str(tmp_path / "cache")}


def synthetic(**values: Any) -> Data:
    return build({"kind": "synthetic", "seq_len": 32, "num_samples": 1000, **values}, seed=values.pop("seed", 0))


def test_windows_tile_the_stream_and_held_out_tokens_are_in_no_training_sample(text: dict[str, Any]) -> None:
    data, stream = build({**text, "val_fraction": 0.1}, seed=0), [*TEXT, 0]
    train = sorted(tuple(data.train(i).tolist()) for i in range(data.num_train))
    first = len(stream) - (data.num_val * 10 + 1)
    assert train == sorted(tuple(stream[10 * i : 10 * i + 11]) for i in range(data.num_train))
    assert 10 * data.num_train + 1 <= first
    held_out = sorted(tuple(data.val(i).tolist()) for i in range(data.num_val))
    assert held_out == sorted(tuple(stream[first + 10 * i : first + 10 * i + 11]) for i in range(data.num_val))
    assert abs(data.num_val / (data.num_val + data.num_train) - 0.1) < 0.01
    assert data.decode(data.encode("grün")) == "grün" and data.vocab_size == vocab_size(text) == 256


def test_epochs_follow_each_other_in_new_orders(text: dict[str, Any]) -> None:
    data = build(text, seed=3)
    epochs = [[tuple(data.train(e * data.num_train + i).tolist()) for i in range(data.num_train)] for e in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_orders_training_and_leaves_the_held_out_samples(text: dict[str, Any]) -> None:
    one, two = build(text, seed=1), build(text, seed=2)
    assert [one.train(i).tolist() for i in range(9)] != [two.train(i).tolist() for i in range(9)]
    assert all((one.val(i) == two.val(i)).all() for i in range(one.num_val))
    assert one.fingerprint == two.fingerprint


def test_the_fingerprint_is_of_the_samples(text: dict[str, Any], tmp_path: Path) -> None:
    fingerprint = build(text, seed=0).fingerprint
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "b.txt"
    moved.write_bytes(TEXT)
    assert build({**text, "path": str(moved)}, seed=0).fingerprint == fingerprint
    assert build({**text, "seq_len": 11}, seed=0).fingerprint != fingerprint
    assert build({**text, "val_fraction": 0.5}, seed=0).fingerprint != fingerprint
    moved.write_bytes(TEXT[:-1] + b"?")
    assert build({**text, "path": str(moved)}, seed=0).fingerprint != fingerprint


def test_another_process_sees_the_same_samples(text: dict[str, Any]) -> None:
    code = (
        f"from framework.data.samples import build; d = build({text!r}, seed=5); print(d.train(10**12).tolist(), d.fingerprint)"
    )
    data = build(text, seed=5)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert out.stdout.strip() == f"{data.train(10**12).tolist()} {data.fingerprint}"


def test_building_data_imports_no_heavy_library() -> None:
    code = "import sys, framework.data.samples; print({'torch', 'tokenizers', 'pyarrow', 'datasets', 'ray'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert out.stdout.strip() == "set()"


def test_nothing_is_held_out_with_fraction_0(text: dict[str, Any]) -> None:
    data = build({**text, "val_fraction": 0.0}, seed=0)
    assert data.num_val == 0 and data.num_train == len(TEXT) // 10
    with pytest.raises(ValueError, match=r"held-out sample must be in \[0, 0\), got 0"):
        data.val(0)


def test_too_little_data_is_refused_with_numbers(text: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"data: a training sample of 4096 \+ 1 tokens and 1 held out must fit, got 1993"
    ):
        build({**text, "seq_len": 4096}, seed=0)
    with pytest.raises(ValueError, match="data.num_samples: must leave a sample to train on, got 1"):
        synthetic(num_samples=1)


def test_the_standard_library_is_twelve_megabytes_of_text(tmp_path: Path) -> None:
    data = build({"kind": "stdlib", "seq_len": 256, "cache_dir": str(tmp_path)}, seed=0)
    assert data.num_train > 20_000 and data.num_val > 400 and "stdlib: " in data.summary
    text = "".join(data.decode(data.train(i)) for i in range(200))
    assert "def " in text and "self" in text and text.count("\ufffd") < 20


def test_a_tokenizer_json_makes_fewer_tokens(text: dict[str, Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "</s>": 3}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("hello world " * 50)
    data = build({**text, "seq_len": 50, "val_fraction": 0.0, "tokenizer": str(tmp_path)}, seed=0)
    assert data.vocab_size == 4 and data.num_train == 2
    assert Counter(np.concatenate([data.train(0)[:-1], data.train(1)[:-1]]).tolist()) == {1: 50, 2: 50}


# ---- synthetic


def test_synthetic_samples_are_a_function_of_seed_and_index() -> None:
    one, again, other = synthetic(), synthetic(), build({"kind": "synthetic", "seq_len": 32}, seed=1)
    for i in (999, 0, 10**15, 5):
        assert (one.train(i) == again.train(i)).all()
        assert (one.train(i) != other.train(i)).any()
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_synthetic_values_never_change_between_versions() -> None:
    """Golden losses rest on them."""
    assert build({"kind": "synthetic", "seq_len": 7}, seed=0).train(0).tolist() == [197, 179, 134, 165, 64, 71, 106, 25]
    assert build({"kind": "synthetic", "seq_len": 7}, seed=1).val(3).tolist() == [3, 22, 117, 80, 151, 250, 233, 148]


def test_synthetic_held_out_samples_are_in_no_epoch() -> None:
    data = synthetic(noise=1.0)
    train = {tuple(data.train(i).tolist()) for i in range(data.num_train)}
    held_out = {tuple(data.val(i).tolist()) for i in range(data.num_val)}
    assert len(train) == data.num_train == 980 and len(held_out) == data.num_val == 20
    assert not train & held_out


@pytest.mark.parametrize("vocab_size", [2, 100, 256, 2**31])
def test_synthetic_tokens_follow_the_rule_but_for_the_noise(vocab_size: int) -> None:
    data = synthetic(vocab_size=vocab_size, seq_len=200)
    samples = np.stack([data.train(i) for i in range(200)])
    assert samples.min() >= 0 and samples.max() < vocab_size and samples.shape == (200, 201)
    follows = (samples[:, 1:] == (5 * samples[:, :-1] + 7) % vocab_size).mean()
    assert abs(follows - (1 - 0.125 * (1 - 1 / vocab_size))) < 0.01
    assert (synthetic(vocab_size=vocab_size, noise=0.0).train(0)[1:] % vocab_size >= 0).all()


def test_the_least_loss_is_that_of_the_true_distribution() -> None:
    data = synthetic(vocab_size=16, num_samples=3000, seq_len=64)
    assert isinstance(data, SyntheticData)
    samples = np.stack([data.train(i) for i in range(2000)])
    right = samples[:, 1:] == (5 * samples[:, :-1] + 7) % 16
    wrong = 0.125 / 16
    loss = -np.where(right, np.log(1 - 15 * wrong), np.log(wrong)).mean()
    assert abs(loss - data.entropy) < 0.02
    assert synthetic(noise=1.0).entropy == pytest.approx(np.log(256))  # type: ignore[attr-defined]
    assert synthetic(noise=0.0).entropy == 0.0  # type: ignore[attr-defined]


# ---- mixtures


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_mixture_keeps_its_proportions_in_every_stretch(weights: list[int]) -> None:
    pattern, total = Pattern.of([float(w) for w in weights]), sum(weights)
    seen: Counter[int] = Counter()
    for index in range(3 * total):
        part, sample = pattern(index)
        assert sample == seen[part], "each part is used in its own order, without gaps"
        seen[part] += 1
        for i, weight in enumerate(weights):
            assert abs(seen[i] - (index + 1) * weight / total) < len(weights)
    assert [seen[i] for i in range(len(weights))] == [3 * w for w in weights]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1 / 3, 2 / 3], [1e-9, 1.0], [0.123456789, 3.14159]])
def test_decimal_weights_are_kept(weights: list[float]) -> None:
    counts = Pattern.of(weights).counts
    assert sum(counts) <= MAX_PATTERN + len(weights) and min(counts) > 0
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / sum(counts) - weight / sum(weights)) <= 1.5 / MAX_PATTERN
    assert Pattern.of([0.7, 0.2, 0.1]).counts == (7, 2, 1)


def test_a_mixture_gives_its_parts_samples(text: dict[str, Any]) -> None:
    parts = [{"kind": "text", "path": text["path"], "weight": 3}, {"kind": "synthetic", "num_samples": 50}]
    values = {"kind": "mixture", "seq_len": 10, "cache_dir": text["cache_dir"], "sources": parts}
    data = build(values, seed=0)
    kinds = Counter("text" if (np.diff(data.train(i)) == 1).mean() > 0.8 else "synthetic" for i in range(400))
    assert kinds == {"text": 300, "synthetic": 100}
    assert all(len(data.val(i)) == 11 for i in range(data.num_val)) and "75%" in data.summary
    assert data.fingerprint == build(values, seed=0).fingerprint
    with pytest.raises(ValueError, match="held-out"):
        data.val(data.num_val)


def test_no_part_of_a_mixture_starts_over_within_an_epoch() -> None:
    parts = [
        {"kind": "synthetic", "noise": 1.0, "num_samples": n, "weight": w} for n, w in ((90, 2), (40, 3), (500, 4))
    ]
    data = build({"kind": "mixture", "seq_len": 10, "val_fraction": 0.1, "sources": parts}, seed=0)
    samples = [tuple(data.train(i).tolist()) for i in range(data.num_train + 1)]
    assert len(set(samples)) == data.num_train, "the next sample is the first that is used again"
    held_out = {tuple(data.val(i).tolist()) for i in range(data.num_val)}
    assert len(held_out) == data.num_val and not held_out & set(samples)


def test_an_error_in_a_part_names_the_part(text: dict[str, Any]) -> None:
    parts = [{"kind": "stdlib"}, {"kind": "text", "path": "nowhere"}]
    source = decode({"kind": "mixture", "seq_len": 10, "cache_dir": text["cache_dir"], "sources": parts})
    with pytest.raises(ValueError, match=r"^data.sources\[1\].path: no such file or folder, got 'nowhere'"):
        build(source, seed=0)
