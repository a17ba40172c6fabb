"""The plan: every decision as a value, on drawn situations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from framework.plan import (
    Place,
    Refused,
    Situation,
    Source,
    Wish,
    held_by_all,
    make_plan,
    microbatches,
    stay,
    worth_growing,
)
from parallel.layout import Layout

WISH = Wish(
    layout=Layout(2, 2, 2),
    schedule="1f1b",
    num_microbatches=4,
    global_batch=16,
    num_nodes=4,
    min_nodes=1,
    max_nodes=4,
    tolerate=2,
)
LAYOUTS = (Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 2, 2), Layout(1, 3, 2), Layout(3, 1, 2), Layout(2, 2, 2))


def places(count: int, *, warm: int = 2) -> tuple[Place, ...]:
    return tuple(Place(f"n{i}", 2, f"n{i}", warm) for i in range(count))


def situation(found: tuple[Place, ...], **more: object) -> Situation:
    base = Situation(
        places=found,
        generation=3,
        source=Source("memory", 40),
        predict=lambda layout: 1.0 / layout.world,
        candidates=lambda slots: [layout for layout in LAYOUTS if layout.world <= slots],
    )
    return replace(base, **more)  # type: ignore[arg-type]


def test_all_nodes_alive_means_the_configured_layout() -> None:
    plan = make_plan("r", WISH, situation(places(4)))
    assert (plan.layout, plan.generation, plan.num_microbatches) == (Layout(2, 2, 2), 4, 4)
    assert [seat.worker for seat in plan.seats] == [f"n{n}.{s}" for n in range(4) for s in range(2)]


def test_a_lost_node_means_the_fastest_layout_of_those_left_and_the_reason_says_so() -> None:
    plan = make_plan("r", WISH, situation(places(3), trouble="node_loss: n3 gone"))
    assert plan.layout.world == 6
    assert plan.reason.startswith("node_loss: n3 gone; use all that lives: layout")
    assert "instead of 2x2x2, which needs 8 workers" in plan.reason and "step 40 from memory" in plan.reason


def test_a_dead_worker_on_a_live_node_is_replaced_because_the_full_layout_soon_pays_for_the_wait() -> None:
    found = (*places(3), Place("n3", 2, "n3", warm=1))
    plan = make_plan("r", WISH, situation(found))
    assert plan.layout == Layout(2, 2, 2)
    assert {option.name for option in plan.options} == {"as configured", "use only what is warm"}


def test_a_wait_that_costs_more_than_it_gains_is_not_chosen() -> None:
    found = (*places(3), Place("n3", 2, "n3", warm=0))
    slow_start = replace(WISH, start_worker_s=900.0, horizon_s=1000.0)
    assert make_plan("r", slow_start, situation(found)).layout.world == 6


def test_spare_nodes_are_used_only_when_needed() -> None:
    spare = replace(WISH, max_nodes=5)
    assert make_plan("r", spare, situation(places(5))).nodes == ("n0", "n1", "n2", "n3")
    without_n1 = tuple(p for p in places(5) if p.node != "n1")
    assert make_plan("r", spare, situation(without_n1)).nodes == ("n0", "n2", "n3", "n4")


def test_tolerance_is_lowered_where_too_few_nodes_are_left_and_the_reason_says_so() -> None:
    plan = make_plan("r", WISH, situation(places(2)))
    assert plan.tolerate == 1
    assert "only 1 losses can be survived with 2 nodes" in plan.reason


def test_too_few_nodes_are_refused_with_their_names() -> None:
    with pytest.raises(Refused, match=r"cluster.min_nodes: 3 nodes must be usable, got 2 \(n0, n1\)"):
        make_plan("r", replace(WISH, min_nodes=3), situation(places(2)))


def test_no_admissible_layout_is_refused() -> None:
    with pytest.raises(Refused, match="no layout of the model fits the 2 workers of 1 nodes"):
        make_plan("r", WISH, situation(places(1), candidates=lambda slots: []))


@pytest.mark.parametrize(
    ("layout", "count"),
    [(Layout(2, 2, 2), 4), (Layout(2, 1, 2), 8), (Layout(1, 3, 2), 3), (Layout(3, 1, 2), 9), (Layout(1, 4, 2), 2)],
)
def test_microbatches_keep_their_size_and_suit_the_pipeline(layout: Layout, count: int) -> None:
    """Configured: 16 samples over dp 2 in 4 microbatches, so 2 samples each."""
    assert microbatches(layout, WISH) == count


def test_growing_needs_a_gain_above_the_hysteresis() -> None:
    plan = make_plan("r", WISH, situation(places(3)))
    option = worth_growing(plan, WISH, situation(places(4)))
    assert option is not None and option.layout == Layout(2, 2, 2)
    flat = situation(places(4), predict=lambda layout: 1.0)
    assert worth_growing(plan, replace(WISH, layout=None), flat) is None
    assert worth_growing(plan, WISH, situation(places(3))) is None


def test_seats_follow_the_bytes_that_nodes_already_hold() -> None:
    """n0 holds what the last block needs, n3 what the first one does."""
    wanted = {"n0": 3, "n1": 1, "n2": 2, "n3": 0}
    plan = make_plan("r", WISH, situation(places(4), overlap=lambda layout, node, ranks: int(ranks.start // 2 == wanted[node])))
    assert plan.nodes == ("n3", "n1", "n2", "n0")


def test_a_layout_that_was_asked_for_is_not_outbid_by_a_smaller_one() -> None:
    """A worker was killed; the cost model thought half of the workers to be faster than all, and did not replace it."""
    found = (*places(3), Place("n3", 2, "n3", warm=1))
    smaller_is_faster = situation(found, predict=lambda layout: float(layout.world))
    assert make_plan("r", WISH, smaller_is_faster).layout == Layout(2, 2, 2)


def test_bytes_that_must_move_delay_an_option_and_are_said_in_it() -> None:
    """Six workers under 1x3x2: nothing of it is in place, and 90 GB for each of three nodes take a minute and a half."""
    far = situation(places(3), overlap=lambda layout, node, ranks: 0, needed=lambda layout: 270 * 10**9)
    plan = make_plan("r", WISH, far)
    chosen = next(option for option in plan.options if option.layout == plan.layout)
    assert chosen.moved_bytes == 270 * 10**9 and chosen.delay_s == pytest.approx(2.0 + 90.0)
    assert "257492.1 MiB move" in str(chosen) and "257492.1 MiB of state change their node" in plan.reason


def test_every_layout_of_what_is_left_has_a_score() -> None:
    plan = make_plan("r", WISH, situation(places(3)))
    assert {option.layout for option in plan.options} == {layout for layout in LAYOUTS if layout.world <= 6}
    assert [o.useful for o in plan.options] == sorted((o.useful for o in plan.options), reverse=True)


def test_who_trains_now_is_preferred_to_a_spare_that_is_as_warm() -> None:
    """A lost machine came back as the spare; at the next trouble it took its old seat, and the state moved for nothing."""
    order = tuple(sorted(places(5), key=lambda p: p.node == "n2"))
    assert set(make_plan("r", WISH, situation(order)).nodes) == {"n0", "n1", "n3", "n4"}


def test_the_way_to_the_layout_that_was_asked_for_is_named() -> None:
    all_four = ("n0", "n1", "n2", "n3")
    after = {"trouble": "node_loss", "seated": all_four}
    spared = tuple(p for p in places(5) if p.node != "n1")
    replaced = (*places(3), Place("n3", 2, "n3", warm=1))
    assert make_plan("r", WISH, situation(spared, **after)).options[0].name == "use n4"
    assert make_plan("r", WISH, situation(replaced, **after)).options[0].name == "replace in place"
    assert make_plan("r", WISH, situation(places(4))).options[0].name == "as configured"


def test_a_loss_never_gives_a_run_more_ranks_than_were_asked_for() -> None:
    """One rank on four nodes, whose other three are warm: after a loss it once was to go on with three."""
    wish = replace(WISH, layout=Layout(), num_nodes=4, tolerate=0)
    found = tuple(Place(f"n{i}", 1, f"n{i}", int(i > 0)) for i in range(4))
    plan = make_plan("r", wish, situation(found, trouble="crash: rank 0", seated=("n0",), candidates=lambda slots: [Layout(), Layout(dp=3)][: slots]))
    assert {option.layout for option in plan.options} == {Layout()}


def test_who_stays_has_the_same_seats_and_its_own_state_under_a_new_number() -> None:
    before = make_plan("r", WISH, situation(places(4)))
    after = stay(before, generation=before.generation, step=44, trouble="crash: the vault process died")
    assert (after.layout, after.seats, after.domains, after.tolerate) == (before.layout, before.seats, before.domains, before.tolerate)
    assert (after.generation, after.source) == (before.generation + 1, Source("ranks", 44))
    assert after.reason.startswith("crash: the vault process died; as before: layout 2x2x2 on 4 nodes")


def test_a_state_is_held_if_every_worker_of_a_plan_holds_the_same_step() -> None:
    plan = make_plan("r", WISH, situation(places(4)))
    told = {seat.worker: (plan, 44) for seat in plan.seats}
    assert held_by_all(told) == (plan, 44)
    assert held_by_all(told | {"n7.0": (replace(plan, generation=2), 40)}) == (plan, 44)
    assert held_by_all(told | {"n1.0": (plan, 43)}) is None
    assert held_by_all(told | {"n1.0": (replace(plan, generation=2), 44)}) is None
    assert held_by_all({name: held for name, held in told.items() if name != "n3.1"}) is None
    assert held_by_all({}) is None
