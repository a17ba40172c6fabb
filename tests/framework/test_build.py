"""Build: a model of the user's own gets the arguments that it takes, and the peak belongs to all workers."""

import dataclasses
import time

import pytest
import torch

from framework.build import make_atlas, make_mfu, model_builder
from framework.config import decode
from parallel.layout import Layout
from tests.framework.test_config import values

TARGET = "tests.parallel.user_model.Recurrence"


def config(**changed):
    return decode(values(model___target_=TARGET, **changed))


def test_of_the_keys_that_every_model_has_it_gets_those_it_takes_and_all_further_ones():
    with torch.device("meta"):
        model = model_builder(config(model__length=64, model__dim=48, model__num_layers=3))()
    assert (model.dim, len(model.layers), model.head.out_features) == (48, 3, 256)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "model.length: must be given, for .*Recurrence takes it, got nothing; use \\+model.length="),
        ({"model__length": 64, "model__experts": 8}, "model.experts: must be an argument of .*Recurrence, got none of that name"),
        ({"model___target_": "tests.parallel.user_model.Nothing"}, "model._target_: must name an importable class"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, says):
    with pytest.raises(ValueError, match=says):
        model_builder(decode(values(**{"model___target_": TARGET} | changed)))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layout__tp": 2, "cluster__num_nodes": 8}, "layout.tp: must be 1 for model Recurrence, which has no tp_plan"),
        ({"model__num_layers": 2, "layout__pp": 4, "layout__dp": 1}, "layout: schedule 1f1b has 4 stages at pp 4"),
    ],
)
def test_what_an_engine_would_refuse_is_refused_before_a_worker_is_started(changed, says):
    """It once failed in every worker, three times over, and ended as no progress."""
    changed = {"model___target_": TARGET, "model__length": 64} | changed
    told = decode(values(**{**changed, "model__num_layers": 4}))
    told = dataclasses.replace(told, model=dataclasses.replace(told.model, num_layers=changed.get("model__num_layers", 4)))
    with pytest.raises(ValueError, match=says):
        make_atlas(told)


def test_utilisation_falls_with_the_time_of_a_step_and_with_every_worker_that_is_added():
    one, four = (make_mfu(decode(values()), Layout(dp=n), workers_here=1) for n in (1, 4))
    assert one(0.1) == pytest.approx(2 * one(0.2))
    assert one(0.1) > 1.5 * four(0.1)
    began = time.perf_counter()
    make_mfu(decode(values()), Layout(), workers_here=1)
    assert time.perf_counter() - began < 5, "it must not hold up the start"
