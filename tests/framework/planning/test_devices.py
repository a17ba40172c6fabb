"""Devices: a GPU for each rank or processors for all, and a line that says why."""

import pytest

from framework.config import decode
from framework.planning.devices import Device, decide, device_of, most_ranks
from tests.framework.test_config import values


def config(layout=(1, 1, 1), **changed):
    pp, dp, tp = layout
    return decode(values(layout__pp=pp, layout__dp=dp, layout__tp=tp, **changed))


def on(gpus, layout=(1, 1, 1), **changed):
    return decide(config(layout, **changed), count=lambda: gpus)


@pytest.mark.parametrize(
    ("gpus", "layout", "kind", "says"),
    [
        (0, (1, 1, 1), "cpu", "PyTorch sees no GPU here"),
        (1, (1, 1, 1), "cuda", "this machine's one GPU"),
        (1, (2, 2, 1), "cpu", "4 ranks may have to compute at once, and this machine has 1 GPU; layout.pp=1 layout.dp=1 layout.tp=1 would use"),
        (3, (2, 2, 1), "cpu", "4 ranks may have to compute at once, and this machine has 3 GPUs; a layout of at most 3 ranks would use"),
        (4, (2, 2, 1), "cuda", "4 of this machine's 4 GPUs"),
        (8, (2, 2, 1), "cuda", "4 of this machine's 8 GPUs"),
    ],
)
def test_emulated_machines_use_gpus_where_each_rank_has_one_of_its_own(gpus, layout, kind, says):
    """Four ranks once took the one GPU that there was, which NCCL refuses."""
    found = on(gpus, layout)
    assert found.kind == kind and says in found.reason


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_gpus_that_are_asked_for_and_not_there_are_refused_in_one_line(gpus):
    with pytest.raises(ValueError, match=rf"^cluster\.device: cuda needs a GPU of this machine for each of 4 ranks, got {gpus}; use .*device=cpu$"):
        on(gpus, (2, 2, 1), cluster__device="cuda")


def test_processors_that_are_asked_for_are_used_whatever_there_is():
    assert on(8, cluster__device="cpu") == Device("cpu", "cluster.device=cpu")


def test_where_the_plan_chooses_there_must_be_enough_for_all_workers_it_may_ever_use():
    wish = config(layout__auto=True, cluster__num_nodes=2, cluster__max_nodes=3, cluster__workers_per_node=2)
    assert most_ranks(wish) == 6
    assert decide(wish, count=lambda: 5).kind == "cpu" and decide(wish, count=lambda: 6).kind == "cuda"


def test_in_a_cluster_ray_has_said_what_each_worker_gets():
    there = config(cluster__address="auto", cluster__workers_per_node=8)
    assert decide(there, gpus_per_worker=1.0, count=lambda: 0) == Device("cuda", "every worker has one of its node")
    assert decide(there, gpus_per_worker=0.0, count=lambda: 1) == Device("cpu", "no node has a GPU for each of its workers")
    assert decide(config(cluster__address="auto", cluster__device="cuda")).kind == "cuda"


def test_deepspeed_computes_on_processors_and_says_so():
    assert on(1, layout__engine="deepspeed") == Device("cpu", "layout.engine=deepspeed computes there")


def test_ranks_of_emulated_machines_have_gpus_by_number_and_others_the_one_that_ray_shows_them():
    assert [str(device_of("cuda", rank=r, emulated=True)) for r in range(2)] == ["cuda:0", "cuda:1"]
    assert str(device_of("cuda", rank=5, emulated=False)) == "cuda:0"
    assert str(device_of("cpu", rank=5, emulated=True)) == "cpu"
