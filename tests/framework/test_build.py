"""Build: a model of the user's own gets the arguments that it takes, and the peak belongs to all workers."""

import time

import pytest
import torch

from framework.build import make_mfu, model_builder
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


def test_utilisation_falls_with_the_time_of_a_step_and_with_every_worker_that_is_added():
    one, four = (make_mfu(decode(values()), Layout(dp=n), workers_here=1) for n in (1, 4))
    assert one(0.1) == pytest.approx(2 * one(0.2))
    assert one(0.1) > 1.5 * four(0.1)
    began = time.perf_counter()
    make_mfu(decode(values()), Layout(), workers_here=1)
    assert time.perf_counter() - began < 5, "it must not hold up the start"
