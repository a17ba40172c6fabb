"""The door: what is right comes through and back, what is wrong is refused in one line that names the key."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from framework import decoding
from framework.config import Config, ModelConfig, decode, plain, with_steps
from framework.config_derived import derive
from framework.config_identity import changes, fingerprint
from parallel.layout import Layout

CONFIGS = Path(__file__).parents[2] / "configs"
CHOICES = {"model": "tiny", "data": "synthetic", "optim": "adamw", "layout": "default", "cluster": "local"}
CHOICES |= {"fault_tolerance": "default", "monitor": "default"}


def values(**changed):
    """The default config as plain values, with dotted keys changed (`optim__lr=1`)."""
    tree = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    tree = {key: item for key, item in tree.items() if key not in ("defaults", "hydra")} | {"run_dir": "runs/x"}
    for group, choice in CHOICES.items():
        tree[group] = yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text())
    for key, item in changed.items():
        *groups, last = key.split("__")
        place = tree
        for group in groups:
            place = place[group]
        place[last] = item
    return tree


def refused(match, **changed):
    with pytest.raises(ValueError, match=match) as caught:
        decode(values(**changed))
    assert "\n" not in str(caught.value)


def test_the_default_config_comes_through_and_back():
    config = decode(values())
    assert decode(plain(config)) == config
    assert config.layout.degrees == Layout(2, 2, 1)
    assert config.cluster.num_workers == 4
    assert plain(config)["model"]["_target_"] == "framework.model.Decoder"
    assert yaml.safe_load(yaml.safe_dump(plain(config))) == plain(config), "plain values survive YAML"


def test_what_follows_from_others_is_filled_in():
    config = decode(values(optim__num_steps=70))
    assert config.optim.schedule_steps == 70 and config.cluster.max_nodes == 4
    assert config.layout.num_microbatches == 4
    assert decode(values(layout__pp=1)).layout.num_microbatches == 1
    assert with_steps(config, 100).optim.schedule_steps == 70


def test_the_step_law_gives_rate_and_batch_and_a_given_batch_is_kept():
    law = yaml.safe_load((CONFIGS / "optim" / "step_law.yaml").read_text())
    optim = decode(values(optim=law)).optim
    assert 0 < optim.lr < 1 and optim.global_batch > 1 and optim.warmup_steps == 1000
    assert decode(values(optim=law | {"global_batch": 24})).optim.global_batch == 24
    with pytest.raises(ValueError, match=r"model.dim: must be a positive integer for the step law, got None; or give"):
        derive(values(optim=law, model__dim=None))


def alone(group, file):
    """The default config with one group's file in the place of its default."""
    chosen = yaml.safe_load(file.read_text())
    base = {} if chosen.pop("defaults", None) is None else values()[group]
    tree = values(
        **{group: base | {k: base[k] | v if isinstance(v, dict) and k in base else v for k, v in chosen.items()}}
    )
    if "path" in chosen:
        tree[group]["path"] = "corpus"
    if "sources" in chosen:
        tree[group]["sources"] = [{"kind": "stdlib", "weight": 2}, {"kind": "text", "path": "a", "weight": 1}]
    return tree


@pytest.mark.parametrize(
    "file",
    [f for g in CHOICES for f in sorted((CONFIGS / g).glob("*.yaml"))],
    ids=lambda f: f"{f.parent.name}={f.stem}",
)
def test_every_option_of_every_group_decodes(file):
    config = decode(alone(file.parent.name, file))
    assert decode(plain(config)) == config


def test_every_field_has_a_default_in_yaml_and_every_default_a_field():
    """A key that is only in one of the two would be refused, or silently never set."""
    tree = values()

    def compare(kind, plain_values, where):
        keys = decoding._entries(kind)
        named = {entry.key for entry in keys if not entry.rest}
        assert named == set(plain_values), where
        for entry in keys:
            if dataclasses.is_dataclass(entry.hint):
                compare(entry.hint, plain_values[entry.key], f"{where}.{entry.key}")

    compare(Config, tree, "config")


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 0.144),
        ("laptop", 0.870),
        ("20m", 19.7),
        ("100m", 101.1),
        ("125m", 123.6),
        ("1b", 1236),
        ("7b", 6738),
        ("70b", 70554),
    ],
)
def test_presets_have_the_size_their_name_says(name, millions):
    model = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    dim, vocab = model["dim"], model["vocab_size"] or 256
    kv = dim // model["num_heads"] * model["num_kv_heads"]
    layer = 2 * dim * dim + 2 * dim * kv + 3 * dim * model["ffn_dim"] + 2 * dim
    total = model["num_layers"] * layer + dim + vocab * dim * (1 if model["tie_embeddings"] else 2)
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_model_of_ones_own_may_have_keys_of_its_own():
    config = decode(values(model__experts=8, model___target_="mine.Net", model__num_heads=5))
    assert config.model.extra == {"experts": 8} and plain(config)["model"]["experts"] == 8
    refused(r"model.experts: no such key; model has dim", model__experts=8)


def test_a_layout_is_not_judged_before_auto_has_chosen_but_its_traps_are():
    auto = {"layout__auto": True, "layout__pp": 1, "layout__dp": 1, "layout__num_microbatches": None}
    assert decode(values(**auto)).layout.degrees is None
    refused("layout.dp: is for layout=auto to choose, got 2", **auto | {"layout__dp": 2})
    trap = {"layout__schedule": "zbv_zero_bubble", "layout__reshard_after_forward": True}
    refused("gradients would be wrong without an error", **auto | trap)


def test_one_node_alone_may_keep_the_default_tolerance():
    one = {"layout__pp": 1, "layout__dp": 1, "cluster__num_nodes": 1}
    assert decode(values(**one)).fault_tolerance.tolerate == 1
    refused(
        "fault_tolerance.tolerate: must be below the 2 nodes",
        **one | {"cluster__num_nodes": 2, "fault_tolerance__tolerate": 2},
    )


def test_whole_numbers_may_be_written_as_floats_but_true_is_no_number():
    assert decode(values(optim__num_steps=1e3)).optim.num_steps == 1000
    assert decode(values(optim__lr=1)).optim.lr == 1.0
    refused("optim.num_steps: must be a positive integer, got true", optim__num_steps=True)
    refused("optim.lr: must be a positive number, got nan", optim__lr=float("nan"))


def test_missing_keys_and_groups_are_named():
    tree = values()
    del tree["optim"]["lr"]
    with pytest.raises(ValueError, match=r"optim.lr: must be given, got nothing; for example optim.lr="):
        decode(tree)
    del tree["optim"]
    with pytest.raises(ValueError, match=r"optim: must be given, got nothing"):
        decode(tree)
    refused(r"layout: must be a group of keys, got 'auto'", layout="auto")
    refused(r"data: must be a group of keys, got 'text'; choose one, as in data=text", data="text")


def test_drill_faults_are_decoded_and_refused_by_place():
    config = decode(values(drill__faults=[{"step": 3, "kind": "kill_node", "node": "node1", "phase": "backward"}]))
    assert config.drill.faults[0].node == "node1" and decode(plain(config)) == config
    numbered = values(drill__faults=[{"step": 3, "kind": "kill_node", "node": 2}])
    assert decode(numbered).drill.faults[0].node == "n2" and numbered["drill"]["faults"][0]["node"] == 2
    refused(
        r"drill.faults\[0\].phas: no such key; did you mean",
        drill__faults=[{"step": 3, "kind": "hang", "rank": 0, "phas": "x"}],
    )
    refused(r"drill.faults.*exactly one of rank and node", drill__faults=[{"step": 3, "kind": "hang"}])
    refused(r"drill.faults: must be a list of", drill__faults={"step": 3})


def test_a_value_decodes_by_its_annotation_alone():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        model: ModelConfig

    with pytest.raises(ValueError, match=r"a.b.model.dim: must be a positive integer, got 'x'"):
        decoding.decode(Plain, {"model": values()["model"] | {"dim": "x"}}, "a.b")


def test_a_resumed_run_may_change_some_keys_others_are_recorded_or_refused():
    before = plain(decode(values()))
    layout = plain(decode(values(layout__dp=1, cluster__num_nodes=2, monitor__csv=True, optim__lr=1e-4)))
    found = changes(before, layout)
    found.require()
    assert [str(change) for change in found.recorded] == [f"optim.lr: {before['optim']['lr']} -> 0.0001", "layout.dp: 2 -> 1"]
    other = plain(decode(values(seed=1, model__dim=128)))
    with pytest.raises(
        ValueError, match=r"seed: must be 0 as in the run that is resumed, got 1 \(and 1 more: model.dim\)"
    ):
        changes(before, other).require()
    assert fingerprint(before) == fingerprint(layout) != fingerprint(other)
    assert fingerprint(before) == fingerprint(yaml.safe_load(yaml.safe_dump(before)))
