"""The index: text and back, shard entries and back, and what it refuses."""

import json
from pathlib import Path

import pytest

from fault_tolerance.checkpoints.index import dump, entry_from_plain, entry_to_plain, load
from tests.fault_tolerance.checkpoints.saving import atlas_of, decoder_specs, random_state, save


def test_an_index_survives_its_text(tmp_path: Path) -> None:
    specs = decoder_specs()
    index = save(tmp_path, atlas_of(specs, "2x1x2"), random_state(specs), extra={"note": "Ångström", "lr": 1e-5}).index
    assert load(dump(index), where="x") == index


def test_a_shard_entry_travels_as_json(tmp_path: Path) -> None:
    specs = decoder_specs()
    for entry in save(tmp_path, atlas_of(specs, "1x2x1"), random_state(specs)).index.shards:
        assert entry_from_plain(json.loads(json.dumps(entry_to_plain(entry)))) == entry


def test_torn_changed_foreign_and_newer_texts_are_refused(tmp_path: Path) -> None:
    specs = decoder_specs(layers=1)
    text = dump(save(tmp_path, atlas_of(specs, "1x1x1", layers=1), random_state(specs)).index)
    with pytest.raises(ValueError, match="must be JSON"):
        load(text[:-9], where="x")
    with pytest.raises(ValueError, match="was changed"):
        load(text.replace('"step": 1', '"step": 2'), where="x")
    with pytest.raises(ValueError, match="is not the index"):
        load("[1, 2]", where="x")
    with pytest.raises(ValueError, match="was changed"):
        load(text.replace('"hash": "xxh3_64"', '"hash": "xxh3_65"'), where="x")
    for version in (1, 9):
        with pytest.raises(ValueError, match=f"version must be 2, got {version}; use the Holdfast that wrote it"):
            load(text.replace('"version": 2', f'"version": {version}'), where="x")
