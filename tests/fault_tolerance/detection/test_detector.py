"""Verdicts on drawn timelines: every rank on a clock of its own, seconds apart, in layouts with bubbles and chains."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from fault_tolerance.detection.detector import Detector, Settings
from fault_tolerance.detection.stragglers import Rule
from fault_tolerance.detection.verdict import NAMES_NOBODY, Kind, Topology, Verdict
from parallel.layout import Layout
from parallel.record import Op, Phase
from tests.fault_tolerance.detection.drawn import MS, Drawing, draw, training

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
LARGE = (slow("2x2x2"), slow("1x8x1"))
LAYOUTS = ("1x4x1", "2x2x1", slow("4x1x1"), slow("1x2x2"), *LARGE)


def watch(
    drawing: Drawing, layout: str, *, nodes: tuple[str, ...] | None = None, every_s: float = 0.1, **settings: object
) -> list[tuple[int, Verdict]]:
    """(newest step, verdict) for every verdict of a detector that looks at a drawing from time to time."""
    chosen = Layout.parse(layout)
    topology = Topology(chosen, nodes) if nodes else Topology.one_node_each(chosen)
    detector, out, at = Detector(topology, Settings(**settings)), [], 0.0
    while at < drawing.end_s + every_s:
        out += [(detector.step, verdict) for verdict in detector.observe(drawing.rings(at), now_s=at)]
        at += every_s if at < drawing.busy_s else 1.0
    return out


def from_step(rank: int, onset: int, factor: float) -> Callable[[int, int], float]:
    return lambda r, step: factor if r == rank and step >= onset else 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("jitter", [slow(0.02), 0.1])
def test_a_healthy_run_gets_no_verdict(layout, jitter):
    assert watch(draw(training(Layout.parse(layout), steps=40, jitter=jitter)), layout) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [1.3, slow(2.0), slow(5.0)])
def test_a_straggler_is_named_within_ten_steps(layout, factor):
    dice = random.Random(f"{layout} {factor}")
    rank, onset = dice.randrange(Layout.parse(layout).world), dice.randrange(13, 20)
    programs = training(Layout.parse(layout), steps=32, slow=from_step(rank, onset, factor), seed=onset)
    found = watch(draw(programs, seed=onset), layout)
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.SLOW_COMPUTE, (rank,))]
    assert found[0][0] <= onset + 10
    assert found[0][1].severity == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize("layout", ["1x2x1", "2x2x1", slow("1x4x2")])
def test_unequal_work_blames_nobody_and_who_is_slow_afterwards_is_named(layout):
    """In steps 16 to 35 the first replica has twice the work of the others; rank 1 is slow from step 52 on."""
    chosen = Layout.parse(layout)

    def factor(rank: int, step: int) -> float:
        if 16 <= step < 36:
            return 1.4 if chosen.seat(rank)[1] == 0 else 0.7
        return 2.0 if rank == 1 and step >= 52 else 1.0

    drawing = draw(training(chosen, steps=68, slow=factor))
    detector, found, at, computing = Detector(Topology.one_node_each(chosen)), [], 0.0, {}
    changes = {16: False, 36: True}
    while at < drawing.end_s + 0.1:
        found += [(detector.step, verdict) for verdict in detector.observe(drawing.rings(at), now_s=at)]
        for step in [s for s in changes if detector.step >= s]:
            detector.work_changed(step - 1, alike=changes.pop(step))
            assert detector.computing_s() == {}, "not known yet"
        if 30 <= detector.step < 36:
            computing = detector.computing_s()
        at += 0.1 if at < drawing.busy_s else 1.0
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.SLOW_COMPUTE, (1,))] and 52 < found[0][0] <= 62
    assert computing[0] == pytest.approx(2 * computing[chosen.rank(0, 1, 0)], rel=0.1)


@pytest.mark.parametrize("layout", ["1x4x1", "2x2x1"])
def test_a_rank_that_was_slow_from_the_start_is_named_by_its_peers(layout):
    found = watch(draw(training(Layout.parse(layout), steps=24, slow=from_step(2, 0, 2.0))), layout)
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.SLOW_COMPUTE, (2,))]


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [("2x2x1", "1f1b"), ("4x1x1", "interleaved"), slow("2x2x1", "interleaved"), slow("4x1x1", "1f1b"), slow("4x2x1", "1f1b"), slow("4x2x1", "interleaved")],
)
def test_unequal_stages_and_bubbles_blame_nobody(layout, schedule):
    programs = training(
        Layout.parse(layout), steps=30, schedule=schedule, work=lambda stage: (3 + 4 * (stage % 3)) * MS
    )
    assert watch(draw(programs), layout) == []


@pytest.mark.parametrize(
    ("rank", "schedule"), [(3, "1f1b"), (0, "interleaved"), *(slow(rank, "1f1b") for rank in (0, 1, 2)), *(slow(rank, "interleaved") for rank in (1, 2, 3))]
)
def test_a_straggler_in_an_unequal_pipeline_is_named_and_not_its_victims(schedule, rank):
    programs = training(
        Layout.parse("4x1x1"),
        steps=32,
        schedule=schedule,
        work=lambda s: (3 + 4 * (s % 3)) * MS,
        slow=from_step(rank, 16, 2.0),
    )
    assert [(v.kind, v.ranks) for _, v in watch(draw(programs), "4x1x1")] == [(Kind.SLOW_COMPUTE, (rank,))]


def test_a_chain_of_waiting_leads_to_its_first_link():
    """Rank 0 makes 1 wait, 1 makes 2 wait, 2 makes 3 wait; only 0 works longer."""
    programs: list[list] = [[], [], [], []]
    for step in range(30):
        for rank, program in enumerate(programs):
            program += [("mark", step, Phase.TRAIN), ("compute", (30 if rank == 0 and step >= 15 else 10) * MS)]
            program += [("recv", rank - 1, 64)] if rank else []
            program += [("compute", 1 * MS)]
            program += [("send", rank + 1, 64)] if rank < 3 else []
            program += [("meet", (0, 1, 2, 3), 8)]
    for program in programs:
        program.append(("mark", 30, Phase.TRAIN))
    for layout in ("4x1x1", "1x4x1"):
        assert [(v.kind, v.ranks) for _, v in watch(draw(programs), layout)] == [(Kind.SLOW_COMPUTE, (0,))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_when_all_are_slow_nobody_is_named(layout):
    programs = training(Layout.parse(layout), steps=30, slow=lambda rank, step: 1.8 if step >= 14 else 1.0)
    assert {v.kind for _, v in watch(draw(programs), layout)} == {Kind.SLOW_ALL}


@pytest.mark.parametrize("layout", ["1x4x1", *LARGE])
def test_a_straggler_that_wanders_blames_nobody(layout):
    world = Layout.parse(layout).world
    order = [(step * 5 + step // world) % world for step in range(40)]
    programs = training(Layout.parse(layout), steps=40, slow=lambda rank, step: 2.0 if order[step] == rank else 1.0)
    assert all(v.kind in NAMES_NOBODY for _, v in watch(draw(programs), layout))


def test_a_stage_whose_work_grew_is_no_slow_machine():
    programs = training(
        Layout.parse("2x2x1"), steps=30, slow=lambda rank, step: 1.6 if rank >= 2 and step >= 14 else 1.0
    )
    assert watch(draw(programs), "2x2x1", rule=Rule(drift=9.0)) == []


def test_all_ranks_of_a_slow_machine_are_named_together():
    programs = training(
        Layout.parse("2x2x1"), steps=30, slow=lambda rank, step: 1.6 if rank >= 2 and step >= 14 else 1.0
    )
    found = watch(draw(programs), "2x2x1", nodes=("a", "a", "b", "b"))
    assert [(v.kind, v.ranks, v.nodes) for _, v in found] == [(Kind.SLOW_COMPUTE, (2, 3), ("b",))]


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 6))])
def test_a_fifth_of_the_records_may_be_lost(seed):
    rank = seed % 4
    quiet = training(Layout.parse("2x2x1"), steps=40, seed=seed)
    assert watch(draw(quiet, lost=0.2, seed=seed), "2x2x1") == []
    programs = training(Layout.parse("2x2x1"), steps=40, slow=from_step(rank, 18, 2.0), seed=seed)
    found = watch(draw(programs, lost=0.2, seed=seed), "2x2x1")
    assert found and {(v.kind, v.ranks) for _, v in found} == {(Kind.SLOW_COMPUTE, (rank,))}


@pytest.mark.parametrize("layout", ["1x4x1", slow("2x2x1"), slow("4x1x1")])
def test_a_drift_of_a_tenth_is_found(layout):
    programs = training(Layout.parse(layout), steps=60, slow=from_step(1, 30, 1.1), jitter=0.02)
    found = watch(draw(programs), layout)
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.SLOW_COMPUTE, (1,))]
    assert 30 < found[0][0] <= 45


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lost", [0.0, slow(0.2)])
def test_who_never_came_is_named_through_all_axes(layout, lost):
    world = Layout.parse(layout).world
    for seed in range(4):
        dice = random.Random(f"{layout} {seed}")
        rank = dice.randrange(world)
        programs = training(Layout.parse(layout), steps=20, seed=seed)
        at = dice.randrange(len(programs[rank]) // 2, len(programs[rank]) - 3)
        programs[rank].insert(at, ("stop",))
        found = [v for _, v in watch(draw(programs, lost=lost, seed=seed), layout) if v.confidence >= 0.8]
        assert {(v.kind, v.ranks) for v in found} <= {(Kind.HANG, (rank,))}
        assert found or lost


def test_a_hang_is_seen_within_fifteen_seconds():
    programs = training(Layout.parse("2x2x1"), steps=20)
    programs[1].insert(len(programs[1]) * 3 // 4, ("stop",))
    drawing = draw(programs)
    stopped_s = drawing.end_s - 60
    detector, at = Detector(Topology.one_node_each(Layout.parse("2x2x1"))), 0.0
    while not detector.observe(drawing.rings(at), now_s=at):
        at += 0.25
    assert at - stopped_s < 15


def test_nobody_hangs_in_the_first_step_of_a_run():
    programs = training(Layout.parse("2x2x1"), steps=1)
    for program in programs[1:]:
        program.insert(1, ("compute", 45.0))
    assert watch(draw(programs), "2x2x1") == []


@pytest.mark.parametrize("phase", [Phase.COMPILE, Phase.EVALUATE, Phase.CHECKPOINT])
def test_a_rank_may_keep_others_waiting_if_it_said_why(phase):
    def before(rank, step):
        if step != 12:
            return []
        pause = [("mark", step, phase), ("compute", 40.0), ("mark", step, Phase.TRAIN)]
        return pause if rank == 0 else []

    assert watch(draw(training(Layout.parse("2x2x1"), steps=20, before=before)), "2x2x1", every_s=0.5) == []


def test_a_rank_that_keeps_others_waiting_and_does_not_say_why_hangs():
    silent = lambda rank, step: [("compute", 40.0)] if rank == 0 and step == 12 else []  # noqa: E731
    found = watch(draw(training(Layout.parse("2x2x1"), steps=20, before=silent)), "2x2x1", every_s=0.5)
    assert (Kind.HANG, (0,)) in [(v.kind, v.ranks) for _, v in found]


def test_a_message_that_does_not_arrive_names_the_way():
    def wire(ends, size, step):
        return None if ends == (3, 1) and step == 10 else 0.2 * MS

    found = watch(draw(training(Layout.parse("2x2x1"), steps=20), wire=wire), "2x2x1")
    assert [(v.kind, v.link) for _, v in found] == [(Kind.LINK_HANG, (3, 1))]


def test_a_collective_to_which_all_came_names_its_ranks():
    def wire(ends, size, step):
        return None if size == 1 << 20 and ends == (2, 3) and step == 10 else 0.2 * MS

    found = watch(draw(training(Layout.parse("2x2x1"), steps=20), wire=wire), "2x2x1")
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.LINK_HANG, (2, 3))]


def test_no_way_is_blamed_for_a_rank_that_cannot_be_read():
    """An agent stood still for half a minute. Its rank was last seen in an all-reduce to which all had come, so all who waited for
    that rank later led to the all-reduce, and a way was called broken.
    """
    away = lambda rank, step: [("compute", 40.0)] if rank == 0 and step == 12 else []  # noqa: E731
    drawing = draw(training(Layout.parse("2x2x1"), steps=20, before=away))
    waits = [(e.wait, e.end) for e in drawing.events[0] if e.step == 11 and e.op is Op.ALLREDUCE]
    assert waits
    for begun, ended in waits:
        detector, out = Detector(Topology.one_node_each(Layout.parse("2x2x1")), Settings(silent_s=math.inf)), []
        detector.observe(drawing.rings((begun + ended) / 2), now_s=0.0)
        for second in range(1, 30):
            seen = {rank: ring for rank, ring in drawing.rings(ended + second).items() if rank != 0}
            out += detector.observe(seen, now_s=float(second))
        assert [v.reason for v in out if v.kind == Kind.LINK_HANG] == []


def test_ranks_that_wait_in_a_circle_call_in_different_orders():
    a, b = ("meet", (0, 1), 8), ("meet", (0, 1, 2), 8)
    start = [("mark", 0, Phase.TRAIN)]
    for step in range(8):
        start += [("compute", 0.01), a, b, ("mark", step + 1, Phase.TRAIN)]
    third = [action for action in start if action != a]
    drawing = draw([[*start, a, b], [*start, b, a], [*third, b]])
    found = watch(drawing, "1x3x1")
    assert [(v.kind, v.ranks) for _, v in found] == [(Kind.MISMATCH, (1,))], "rank 1 does not do what it did before"


def test_another_shape_is_a_mismatch_of_the_odd_one():
    programs = training(Layout.parse("1x4x1"), steps=20)
    at = [i for i, action in enumerate(programs[2]) if action[0] == "meet"][20]
    programs[2][at] = (*programs[2][at][:2], 999)
    found = watch(draw(programs), "1x4x1")
    assert (Kind.MISMATCH, (2,)) in [(v.kind, v.ranks) for _, v in found]


def test_another_operation_is_a_mismatch():
    programs = training(Layout.parse("1x4x1"), steps=20)
    at = [i for i, action in enumerate(programs[2]) if action[0] == "meet"][20]
    programs[2][at] = (*programs[2][at], Op.ALLGATHER_BASE)
    assert (Kind.MISMATCH, (2,)) in [(v.kind, v.ranks) for _, v in watch(draw(programs), "1x4x1")]


def test_a_skipped_collective_is_a_mismatch_though_all_look_alike():
    programs: list[list] = [[], [], [], []]
    for rank, program in enumerate(programs):
        for step in range(20):
            program += [("mark", step, Phase.TRAIN), ("compute", 10 * MS)]
            program += [] if rank == 3 and step == 12 else [("meet", (0, 1, 2, 3), 4096)]
    found = watch(draw(programs), "1x4x1")
    assert found[0][1].kind == Kind.MISMATCH and found[0][1].ranks == (3,)
    assert found[0][1].confidence > 0.9


SLOW = 12 * MS


@pytest.mark.parametrize("link", [(1, 3), slow((3, 1)), slow((0, 2))])
def test_a_slow_way_is_a_cell(link):
    def wire(ends, size, step):
        return SLOW if ends == link and step >= 14 else 1 * MS

    found = watch(draw(training(Layout.parse("2x2x1"), steps=30), wire=wire), "2x2x1")
    assert [(v.kind, v.link) for _, v in found] == [(Kind.SLOW_LINK, link)]


def test_a_slow_replica_group_names_its_pair():
    def wire(ends, size, step):
        return SLOW if ends == (2, 3) and size > 1000 and step >= 14 else 1 * MS

    found = watch(draw(training(Layout.parse("2x2x1"), steps=30), wire=wire), "2x2x1")
    assert [(v.kind, set(v.link)) for _, v in found] == [(Kind.SLOW_LINK, {2, 3})]


def test_one_group_alone_is_compared_with_its_past_and_needs_a_pair_test():
    def wire(ends, size, step):
        return 10 * SLOW if size > 1000 and step >= 14 else 1 * MS

    found = watch(draw(training(Layout.parse("1x4x1"), steps=30), wire=wire), "1x4x1")
    assert [(v.kind, v.ranks, v.link) for _, v in found] == [(Kind.SLOW_LINK, (0, 1, 2, 3), None)]
    assert "pair test" in found[0][1].reason


def test_a_machine_that_sends_slowly_is_a_row():
    def wire(ends, size, step):
        return SLOW if len(ends) == 2 and ends[0] == 4 and step >= 14 else 1 * MS

    layout = "3x2x1"
    programs = training(Layout.parse(layout), steps=30)
    nodes = tuple("abcdef")
    pairs: list[list] = [
        [action for action in program if action[0] != "meet" or action[2] < 1000] for program in programs
    ]
    found = watch(draw(pairs, wire=wire), layout, nodes=nodes)
    assert found and all(4 in v.ranks for _, v in found)
    assert any("sends" in v.reason or v.link for _, v in found)


def test_the_dead_are_named_at_once_and_not_those_next_to_them():
    programs = training(Layout.parse("2x2x1"), steps=20)
    programs[3].insert(200, ("stop",))
    drawing = draw(programs)
    detector = Detector(Topology.one_node_each(Layout.parse("2x2x1")))
    assert detector.observe(drawing.rings(1.5), now_s=1.5) == []
    drawing.process[3] = "X"
    (verdict,) = detector.observe(drawing.rings(drawing.end_s), now_s=2.0)
    assert (verdict.kind, verdict.ranks, verdict.nodes) == (Kind.CRASH, (3,), ("node3",))
    assert detector.observe(drawing.rings(drawing.end_s), now_s=3.0) == []
    assert list(detector.active.values())[0].kind == Kind.CRASH


def test_a_rank_that_said_it_was_through_did_not_die():
    programs = training(Layout.parse("1x2x1"), steps=4)
    for program in programs:
        program.append(("mark", 4, Phase.IDLE))
    drawing = draw(programs)
    drawing.process = {0: "X", 1: "X"}
    detector = Detector(Topology.one_node_each(Layout.parse("1x2x1")))
    assert detector.observe(drawing.rings(), now_s=9.0) == []


def test_a_stopped_process_is_named_before_any_deadline():
    programs = training(Layout.parse("1x4x1"), steps=20)
    programs[2].insert(30, ("stop",))
    drawing = draw(programs)
    drawing.process[2] = "T"
    watch = Detector(Topology.one_node_each(Layout.parse("1x4x1")))
    assert watch.observe(drawing.rings(drawing.end_s), now_s=1.0) == []  # it may be continued: who is throttled is slow
    (found,) = watch.observe(drawing.rings(drawing.end_s), now_s=2.0)
    assert (found.kind, found.ranks) == (Kind.HANG, (2,)) and "stopped" in found.reason


def test_a_machine_of_which_nothing_can_be_read_is_lost():
    layout = Layout.parse("1x4x1")
    detector = Detector(Topology(layout, ("a", "a", "b", "b")))
    drawing = draw(training(layout, steps=20))
    for second in range(10):
        rings = drawing.rings(second * 0.1)
        seen = {r: ring if second < 4 or r < 2 else None for r, ring in rings.items()}
        found = detector.observe(seen, now_s=float(second))
        if found:
            break
    assert second == 7
    assert [(v.kind, v.ranks, v.nodes) for v in found] == [(Kind.NODE_LOSS, (2, 3), ("b",))]


def test_a_rank_that_begins_late_is_not_gone():
    """Two of four ranks connected 4 s after the others: their rings were read and were empty, which had counted as rings that
    cannot be read, and a healthy machine was called lost."""
    layout = Layout.parse("1x4x1")
    detector = Detector(Topology(layout, ("a", "a", "b", "b")))
    drawing = draw(training(layout, steps=20))
    for second in range(10):
        begun = drawing.rings(second * 0.1)
        seen = {r: ring if r < 2 or second > 7 else b"" for r, ring in begun.items()}
        assert detector.observe(seen, now_s=float(second)) == []
    never = Detector(Topology(layout, ("a", "a", "b", "b")))
    for second in range(10):  # nobody lent them a ring, or nobody has answered yet: there is nothing that went silent
        some = {r: ring for r, ring in drawing.rings(second * 0.1).items() if r < 2}
        assert never.observe(some, now_s=float(second)) == []


def test_if_nothing_can_be_read_the_reader_is_at_fault():
    layout = Layout.parse("1x2x1")
    detector = Detector(Topology.one_node_each(layout))
    detector.observe(draw(training(layout, steps=3)).rings(), now_s=0.0)
    assert detector.observe({0: None, 1: None}, now_s=60.0) == []


def test_news_and_whole_rings_lead_to_the_same_verdicts():
    """A vault hands out only new records: what is judged must not depend on it."""
    programs = training(Layout.parse("2x2x1"), steps=30, slow=from_step(1, 14, 2.0))
    drawing = draw(programs)
    topology = Topology.one_node_each(Layout.parse("2x2x1"))
    whole, news = Detector(topology), Detector(topology)
    handed = dict.fromkeys(range(4), -1)
    at, found = 0.0, ([], [])
    while at < drawing.end_s:
        rings = drawing.rings(at)
        found[0].extend(whole.observe(rings, now_s=at))
        parts = {r: replace(g, records=tuple(x for x in g.records if x.ticket > handed[r])) for r, g in rings.items()}
        for r, ring in parts.items():
            running = [x.ticket for x in ring.records if x.open]
            handed[r] = min(running) - 1 if running else max([handed[r], *(x.ticket for x in ring.records)])
        found[1].extend(news.observe(parts, now_s=at))
        at += 0.1
    assert found[0] == found[1] and len(found[0]) == 1
