"""Vitals, peak and startup: the numbers beside the training."""

from __future__ import annotations

import time

import pytest
import torch

from framework.monitor.startup import Startup
from framework.monitor.vitals import PERIOD_S, Vitals, numbers
from framework.training.peak import peak_flops, shared


class Answer:
    """A call whose answer comes when it is told to."""

    def __init__(self, value):
        self.value, self.there = value, False

    def done(self):
        return self.there

    def result(self, timeout_s):
        return self.value


class Asked:
    def __init__(self, value):
        self.answer, self.times = Answer(value), 0

    def call(self, method):
        self.times += 1
        return self.answer


def test_nodes_keep_their_names_and_workers_are_summed():
    answers = {"sys/n0": {"load": 1.5}, "sys/n1": {"load": 0.5}, "mem/n0.0": {"rss_bytes": 3.0}, "mem/n1.0": {"rss_bytes": 5.0}}
    expected = {"sys/n0/load": 1.5, "sys/n1/load": 0.5, "mem/rss_bytes_max": 5.0, "mem/rss_bytes_sum": 8.0}
    assert numbers(answers) == expected


def test_who_does_not_answer_is_left_out_and_asked_once():
    quick, mute = Asked({"load": 1.0}), Asked({"load": 9.0})
    vitals = Vitals()
    assert vitals.poll(0.0, {"n0": quick, "n1": mute}, {}) == {}
    quick.answer.there = True
    assert vitals.poll(1.0, {"n0": quick, "n1": mute}, {}) == {}, "the other may still answer"
    assert vitals.poll(PERIOD_S + 1, {"n0": quick, "n1": mute}, {}) == {"sys/n0/load": 1.0}
    assert (quick.times, mute.times) == (1, 1)


def test_a_peak_is_no_less_than_what_a_product_reaches():
    torch.set_num_threads(1)
    a = torch.ones(512, 512)
    began = time.perf_counter()
    for _ in range(4):
        _ = a @ a
    reached = 4 * 2 * 512**3 / (time.perf_counter() - began)
    assert peak_flops("cpu", precision="fp32") > 0.3 * reached


def test_workers_that_share_a_machine_share_its_cores():
    assert shared(10.0, workers_here=4, threads=1, cores=2) == 5.0
    assert shared(10.0, workers_here=2, threads=1, cores=8) == 10.0


def test_the_parts_of_a_start_add_up():
    startup = Startup(time.time() - 5.0, {"config": 1.0})
    startup.mark("cluster")
    assert startup.parts["cluster"] == pytest.approx(4.0, abs=0.1)
    startup.divide("cluster", {"raylets": 1.5, "nothing": 0.0})
    assert startup.parts == {"config": 1.0, "cluster": pytest.approx(2.5, abs=0.1), "raylets": 1.5}
    again = Startup(**startup.plain())
    again.mark("first step")
    assert again.total_s == pytest.approx(5.0, abs=0.2) and "raylets 1.5" in again.words()
