"""Encounters, look by look, against the plain way: to put the newest records together anew at each look."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fault_tolerance.detection.detector import Detector
from fault_tolerance.detection.encounters import MISMATCH_STEPS, Encounters
from fault_tolerance.detection.links import could_be_slow, judge_links, normalised
from fault_tolerance.detection.mismatches import judge_mismatches
from fault_tolerance.detection.timeline import meetings
from fault_tolerance.detection.verdict import Kind, Topology
from parallel.layout import Layout
from parallel.record import Op, Phase
from tests.fault_tolerance.detection.drawn import MS, draw, training
from tests.fault_tolerance.detection.plain import clock_offsets, delays, transfers

WINDOW = 6


def cut(rings, step):
    return {rank: replace(ring, records=tuple(r for r in ring.records if r.step >= step)) for rank, ring in rings.items()}


def in_order(samples):
    return sorted((d.ends, str(d.like), d.step, d.seconds) for d in samples)


def looks(drawing, every_s=0.15):
    return [drawing.rings(at * every_s) for at in range(int(drawing.busy_s / every_s) + 3)]


@pytest.mark.parametrize("lost", [0.0, 0.05])
@pytest.mark.parametrize("layout", ["2x2x1", "1x2x2", "4x1x1"])
def test_the_samples_of_ways_are_those_that_all_records_of_the_window_give(layout, lost):
    chosen = Layout.parse(layout)
    encounters, seen = Encounters(Topology.one_node_each(chosen)), 0
    for rings in looks(draw(training(chosen, steps=24, jitter=0.1), lost=lost, seed=3)):
        newest = min(ring.step for ring in rings.values())
        encounters.forget(newest - WINDOW - 1)
        for rank, ring in rings.items():
            encounters.take(rank, ring)
        recent = cut(rings, newest - WINDOW)
        met = meetings(recent).values()
        plain = delays(transfers(recent).values(), met, clock_offsets(met))
        assert in_order(encounters.delays(newest - WINDOW, 0)) == in_order(plain)
        seen += len(plain)
    assert seen > 300


def test_only_what_is_new_in_a_ring_says_the_same_as_the_whole_ring():
    chosen = Layout.parse("2x2x1")
    whole, parts, known = Encounters(Topology.one_node_each(chosen)), Encounters(Topology.one_node_each(chosen)), {}
    for rings in looks(draw(training(chosen, steps=16))):
        for rank, ring in rings.items():
            whole.take(rank, ring)
            open_from = next((r.ticket for r in ring.records if r.end_ns == 0 and r.op != Op.MARK), ring.head)
            parts.take(rank, replace(ring, records=tuple(r for r in ring.records if r.ticket >= known.get(rank, 0))))
            known[rank] = open_from
        assert in_order(whole.delays(0, 0)) == in_order(parts.delays(0, 0))


def test_on_one_machine_only_groups_of_more_than_two_tell_of_ways_and_no_verdict_is_lost_by_that():
    chosen = Layout.parse("2x2x1")
    topology = Topology(chosen, ("n0",) * 4)
    encounters = Encounters(topology)
    rings = draw(training(chosen, steps=20), wire=lambda ends, size, step: 30 * MS if len(ends) == 4 and step > 2 else 0.2 * MS).rings()
    for rank, ring in rings.items():
        encounters.take(rank, ring)
    met = meetings(rings).values()
    plain = delays(transfers(rings).values(), met, clock_offsets(met))
    kept = encounters.delays(0, 0)
    assert {len(d.ends) for d in kept} == {4} and {len(d.ends) for d in plain} == {2, 4}
    past = {((0, 1, 2, 3), next(d.like for d in kept)): 0.2 * MS}
    said = [judge_links(normalised(samples, past), topology, least_s=0.05) for samples in (kept, plain)]
    assert said[0] == said[1] and [v.kind for v in said[0]] == [Kind.SLOW_LINK]


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0, 8.0])
def test_ways_are_not_compared_where_none_could_be_found_slow(share):
    chosen = Layout.parse("1x4x1")
    way = draw(training(chosen, steps=20), wire=lambda ends, size, step: 4 * MS if 2 in ends and len(ends) == 4 else 0.2 * MS).rings()
    met = meetings(way).values()
    samples = delays(transfers(way).values(), met, clock_offsets(met))
    longest = max(sum(d.seconds for d in samples if (d.ends, d.like) == key) for key in {(d.ends, d.like) for d in samples})
    past = {(d.ends, d.like): 0.2 * MS for d in samples}
    found = judge_links(normalised(samples, past), Topology.one_node_each(chosen), least_s=share * longest)
    assert could_be_slow(samples, share * longest) or not found
    assert could_be_slow(samples, share * longest) == (share < 1.3)


def odd(rank, step):
    """Rank 1 reduces something else in step 9; in another drawing it leaves an operation out."""
    return [("meet", (0, 1, 2, 3), 64 if rank == 1 and step == 9 else 32)]


@pytest.mark.parametrize("wrong", ["bytes", "skipped"])
def test_mismatches_are_those_that_all_records_of_the_last_steps_give(wrong):
    chosen = Layout.parse("1x4x1")
    topology = Topology.one_node_each(chosen)

    def before(rank, step):
        if wrong == "bytes":
            return odd(rank, step)
        return [("meet", (0, 1, 2, 3), 32)] * (0 if rank == 1 and step == 9 else 1)

    encounters, said = Encounters(topology), []
    for rings in looks(draw(training(chosen, steps=20, before=before)), every_s=0.03):
        for rank, ring in rings.items():
            encounters.take(rank, ring)
        newest = min(ring.step for ring in rings.values())
        recent = cut(rings, newest - MISMATCH_STEPS)
        plain = judge_mismatches(meetings(recent).values(), transfers(recent).values(), topology)
        found = encounters.mismatches(newest)
        assert [v.key for v in found] == [v.key for v in plain]
        said += found
    assert {v.ranks for v in said} == {(1,)} and said[0].kind == Kind.MISMATCH


def test_a_look_carries_as_many_records_after_many_steps_as_after_few():
    """The records of 700 steps were carried from look to look, and the newest 2,048 of each rank looked through for a wait."""
    chosen = Layout.parse("1x2x1")
    drawing = draw([
        [action for step in range(900) for action in (("mark", step, Phase.TRAIN), ("compute", MS), *[("meet", (0, 1), 8)] * 6)]
        for _ in range(2)
    ])  # fmt: skip
    detector, at, kept = Detector(Topology(chosen, ("n0", "n0"))), 0.0, []
    while at < drawing.busy_s:
        at += 0.05
        detector.observe(drawing.rings(at), now_s=at)
        kept.append(max(len(ring.records) for ring in detector.rings.values()))
    assert detector.active == {} and len(drawing.events[0]) > 6000 and 2000 < kept[-1] <= max(kept) <= 4096
