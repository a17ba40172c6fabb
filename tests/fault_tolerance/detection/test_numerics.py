"""Which numbers are believed, who spoilt them, and what is done with the step."""

from __future__ import annotations

import math
import random

from fault_tolerance.detection.numerics import Remedy, decide, judge_ranks, judge_replicas, sigmas_above
from fault_tolerance.detection.verdict import Kind, Topology
from parallel.layout import Layout

FOUR = Topology.one_node_each(Layout.parse("1x4x1"))
PAST = [2.0 + 0.05 * random.Random(i).gauss(0, 1) for i in range(40)]


def decided(loss: float, norm: float = 1.0, **options) -> Remedy:
    given = {"spike_sigma": 8.0, "max_skips": 2, "skipped_in_a_row": 0, "retried": False} | options
    return decide(loss, norm, PAST, **given).remedy


def test_an_ordinary_loss_is_kept():
    assert decided(2.1) == Remedy.KEEP
    assert decided(1.0) == Remedy.KEEP, "a low loss is no spike"


def test_a_spoilt_step_is_retried_then_skipped_then_the_run_stops():
    for loss in (math.nan, math.inf, 9.0):
        assert decided(loss) == Remedy.RETRY
        assert decided(loss, retried=True) == Remedy.SKIP
        assert decided(loss, retried=True, skipped_in_a_row=2) == Remedy.STOP
        assert decided(loss, applied=True) == Remedy.ROLL_BACK
    assert decided(2.0, math.nan) == Remedy.RETRY


def test_spikes_may_be_allowed():
    assert decided(9.0, spike_sigma=None) == Remedy.KEEP
    assert decided(math.nan, spike_sigma=None) == Remedy.RETRY


def test_too_short_a_past_raises_no_spike():
    assert sigmas_above(50.0, PAST[:10]) == 0.0
    assert sigmas_above(50.0, PAST) > 100
    assert sigmas_above(2.0, [2.0] * 20) == 0.0, "a constant loss has no spread to divide by"


def test_the_rank_that_is_not_a_number_is_named():
    (found,) = judge_ranks({0: 1.0, 1: 1.1, 2: math.nan, 3: 0.9}, FOUR)
    assert (found.kind, found.ranks) == (Kind.NAN, (2,))
    (found,) = judge_ranks(dict.fromkeys(range(4), math.nan), FOUR)
    assert (found.kind, found.ranks) == (Kind.NAN, ()) and "diverges" in found.reason


def test_an_outlier_is_measured_by_its_own_stage():
    topology = Topology.one_node_each(Layout.parse("2x2x1"))
    assert judge_ranks({0: 1.0, 1: 1.2, 2: 900.0, 3: 1000.0}, topology) == []
    (found,) = judge_ranks({0: 1.0, 1: 400.0, 2: 900.0, 3: 1000.0}, topology)
    assert (found.kind, found.ranks) == (Kind.OUTLIER, (1,))


def test_the_replica_that_differs_is_named():
    assert judge_replicas(dict.fromkeys(range(4), 7), FOUR) == []
    (found,) = judge_replicas({0: 7, 1: 7, 2: 8, 3: 7}, FOUR)
    assert (found.kind, found.ranks, found.confidence) == (Kind.CORRUPT, (2,), 0.99)


def test_only_what_has_one_name_is_compared():
    digests = {0: ("stage 0", 7), 1: ("stage 0", 7), 2: ("stage 1", 1), 3: ("stage 1", 2)}
    (found,) = judge_replicas(digests, FOUR)
    assert found.ranks == (2, 3) and found.confidence < 0.7, "of two nobody can tell which"
