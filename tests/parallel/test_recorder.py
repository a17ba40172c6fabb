"""Every operation of real process groups is in the ring, unchanged in its results, and readable whatever its rank does."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from parallel import record, ring
from parallel.native import BuildError
from parallel.record import Op, Phase, State, decode
from parallel.recorder import Recorder, install
from parallel.recorder_build import load
from tests.parallel.record_ranks import ranks, run, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def extension():
    try:
        return load()
    except BuildError as error:
        pytest.skip(str(error))


def test_both_sides_agree_on_the_layout_of_a_ring(extension):
    assert extension.sizes() == (record.HEADER_BYTES, record.SLOT.itemsize, record.MAGIC)


def _all_operations(rank: int, recorder: Recorder | None) -> list[list[float]]:
    torch.manual_seed(rank)
    x_8 = torch.randn(8)
    out: list[torch.Tensor] = []

    def keep(*tensors: torch.Tensor) -> None:
        out.extend(tensor.clone() for tensor in tensors)

    if recorder is not None:
        recorder.mark(5, Phase.TRAIN)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG):
        y_8 = x_8.clone()
        dist.all_reduce(y_8, op)
        keep(y_8)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        half_4 = torch.empty(4)
        dist.reduce_scatter_tensor(half_4, x_8, op)
        keep(half_4)
    rows_24, wide_44 = torch.empty(2, 4), torch.randn(4, 4)
    dist.reduce_scatter_tensor(rows_24, wide_44)
    both_16 = torch.empty(16)
    dist.all_gather_into_tensor(both_16, x_8)
    parts = [torch.empty(8), torch.empty(8)]
    dist.all_gather(parts, x_8)
    y_8 = x_8.clone()
    dist.broadcast(y_8, 1)
    keep(rows_24, both_16, *parts, y_8)
    swapped_8 = torch.empty(8)
    dist.all_to_all_single(swapped_8, x_8)
    r_8 = x_8.clone()
    dist.reduce(r_8, 0)
    s_8 = torch.empty(8)
    dist.scatter(s_8, [x_8, x_8 * 2] if rank == 0 else None, 0)
    keep(swapped_8, r_8 if rank == 0 else s_8, s_8)
    got_8 = torch.empty(8)
    work = dist.isend(x_8, 1 - rank)
    dist.recv(got_8, 1 - rank)
    work.wait()
    keep(got_8)
    with torch.no_grad():
        request = dist.all_reduce(x_8, async_op=True)
        request.wait()
        keep(x_8, request.result()[0])
    dist.barrier()
    return [tensor.tolist() for tensor in out]


def test_results_do_not_change_and_every_operation_is_noted():
    plain = run(2, _all_operations, record=False)
    with ranks(2, _all_operations) as started:
        recorded = [started.result(rank) for rank in range(2)]
        rings = [started.ring(rank) for rank in range(2)]
    assert recorded == plain
    expected = (
        [Op.MARK] + [Op.ALLREDUCE] * 3 + [Op.REDUCE_SCATTER_BASE] * 3 + [Op.ALLGATHER_BASE, Op.ALLGATHER]
        + [Op.BROADCAST, Op.ALLTOALL_BASE, Op.REDUCE, Op.SCATTER, Op.SEND, Op.RECV, Op.ALLREDUCE, Op.BARRIER]
    )  # fmt: skip
    for rank, seen in enumerate(rings):
        assert [r.op for r in seen.records] == expected
        assert seen.rank == rank and seen.step == 5
        assert all(r.state == State.DONE and r.end_ns >= r.call_ns and r.step == 5 for r in seen.records)
        assert [r.peer for r in seen.records if r.op in record.TRANSFERS] == [1 - rank] * 2
    collectives = [[(r.group, r.seq, r.bytes, r.shape) for r in seen.records if r.is_collective] for seen in rings]
    assert collectives[0] == collectives[1]
    assert [seq for _, seq, _, _ in collectives[0]] == list(range(14))


def _waits(rank: int, recorder: Recorder) -> None:
    time.sleep(0.3 * rank)
    dist.all_reduce(torch.ones(4))


def test_the_one_who_came_last_did_not_wait():
    with ranks(2, _waits) as started:
        for rank in range(2):
            started.result(rank)
        waits = [(r.end_ns - r.wait_ns) / 1e9 for rank in range(2) for r in started.ring(rank).records]
    assert waits[0] > 0.2 > 0.1 > waits[1]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.down(torch.relu(self.up(x_BD)))


def _three_axes(rank: int, recorder: Recorder) -> float:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    block = parallelize_module(_Block(), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    stage = PipelineStage(block, mesh["pp"].get_local_rank(), 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    x_BD, target_BD = torch.ones(8, 8), torch.zeros(8, 8)
    losses: list[torch.Tensor] = []
    if mesh["pp"].get_local_rank() == 0:
        schedule.step(x_BD)
    else:
        schedule.step(target=target_BD, losses=losses)
    return float(torch.stack(losses).mean()) if losses else 0.0


def test_tensor_data_and_pipeline_parallel_are_all_seen():
    with ranks(8, _three_axes) as started:
        losses = [started.result(rank, 90) for rank in range(8)]
        rings = [started.ring(rank) for rank in range(8)]
    assert losses[4:] == run(8, _three_axes, record=False)[4:]
    for seen in rings:
        axes = {seen.groups[r.group].name.split("_")[-1] for r in seen.records if r.is_collective}
        assert {"dp", "tp"} <= axes
        assert {r.op for r in seen.records} >= {Op.ALLGATHER_BASE, Op.REDUCE_SCATTER_BASE, Op.ALLREDUCE}
        assert any(r.op in record.TRANSFERS for r in seen.records)
        assert all(r.state == State.DONE for r in seen.records)


def _stops_at_two(rank: int, recorder: Recorder) -> None:
    for step in range(100):
        recorder.mark(step, Phase.TRAIN)
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(4))


@pytest.mark.parametrize("end", [None, signal.SIGKILL])
def test_the_ring_of_a_stopped_or_killed_rank_is_readable(end):
    with ranks(2, _stops_at_two) as started:
        wait_for(lambda: started.ring(1).process == "T")
        if end is not None:
            started.signal(1, end)
            wait_for(lambda: started.ring(1).dead)
        seen = started.ring(1)
        assert seen.step == 2 and [r.op for r in seen.records][-1] == Op.MARK
        waiting = wait_for(lambda: started.ring(0).records[-1])
        assert waiting.step == 2 and waiting.state in (State.CALLED, State.FAILED)


def _aborted(rank: int, recorder: Recorder, kind: str) -> tuple[str, float]:
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        time.sleep(3600)
    threading.Timer(0.3, recorder.abort).start()
    start = time.monotonic()
    try:
        if kind == "recv":
            dist.recv(torch.empty(4), 1)
        elif kind == "reduce_scatter":
            dist.reduce_scatter_tensor(torch.empty(2), torch.ones(4))
        else:
            dist.all_reduce(torch.ones(4))
    except dist.DistBackendError as error:
        with pytest.raises(dist.DistBackendError):
            dist.barrier()
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "recv"])
def test_an_abort_frees_a_waiting_rank(kind):
    with ranks(2, _aborted, kind) as started:
        message, waited_s = started.result(0)
        last = started.ring(0).records[-1]
    assert "aborted" in message and 0.25 < waited_s < 2.0
    assert last.state == State.ABORTED


def _times_out(rank: int, recorder: Recorder) -> str:
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        time.sleep(3600)
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(4))
    return str(caught.value)


def test_the_backends_own_timeout_is_kept():
    with ranks(2, _times_out, timeout_s=1.0) as started:
        assert "imed out" in started.result(0)
        assert started.ring(0).records[-1].state == State.FAILED


def _two_generations(rank: int, recorder: Recorder, place: str) -> tuple[set[int], str]:
    dist.all_reduce(torch.ones(4))
    fd = ring.create("second")
    recorder.abort()
    dist.destroy_process_group()
    again = install(fd, generation=1)
    store = dist.FileStore(place, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.all_reduce(torch.ones(4))
    seen = decode(ring.RingReader(fd).read())
    return set(seen.groups), f"{again.on} {seen.generation} {[r.op.name for r in seen.records]}"


def test_a_new_generation_has_groups_of_its_own(tmp_path):
    with ranks(2, _two_generations, str(tmp_path / "store")) as started:
        first = set(wait_for(lambda: started.ring(0).groups))
        results = [started.result(rank) for rank in range(2)]
    assert results[0] == results[1]
    assert first.isdisjoint(results[0][0])
    assert results[0][1] == "True 1 ['ALLREDUCE']"


def test_no_compiler_means_no_record_and_one_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delitem(__import__("sys").modules, "holdfast_recorder", raising=False)
    recorder = install()
    assert not recorder.on and "no-such-compiler" in recorder.reason
    assert [line for line in caplog.messages if "record: off" in line]
    recorder.mark(1, Phase.TRAIN)
    recorder.abort()


def test_a_file_that_is_too_small_is_refused(tmp_path):
    (tmp_path / "small").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"use ring\.create"):
        install(tmp_path / "small")


def test_a_ring_of_the_vault_is_written_in_place(tmp_path):
    fd = ring.create("ring", directory=tmp_path, num_slots=64)
    recorder = install(fd, rank=3, generation=4)
    for step in range(100):
        recorder.mark(step, Phase.TRAIN)
    seen = decode(ring.RingReader(fd).read())
    recorder.close()
    assert (seen.rank, seen.generation, seen.head, len(seen.records), seen.process) == (3, 4, 100, 64, "R")
    assert [r.step for r in seen.records] == list(range(36, 100))


def _on_gpu(rank: int, recorder: Recorder) -> list[float]:
    dist.destroy_process_group()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    x_4 = torch.ones(4, device="cuda")
    dist.all_reduce(x_4)
    torch.cuda.synchronize()
    return x_4.tolist()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: how long NCCL's operations take is polled there"
)
def test_an_operation_on_a_gpu_ends_in_the_record():
    with ranks(1, _on_gpu) as started:
        assert started.result(0) == [1.0] * 4
        last = wait_for(lambda: started.ring(0).records[-1])
        wait_for(lambda: started.ring(0).records[-1].state == State.DONE)
        assert last.op == Op.ALLREDUCE


def test_a_mark_tells_how_long_its_thread_was_kept_from_running(tmp_path):
    fd = ring.create("ring", directory=tmp_path, num_slots=64)
    recorder = install(fd)
    recorder.mark(0, Phase.TRAIN)
    time.sleep(0.01)
    recorder.mark(1, Phase.TRAIN)
    first, second = decode(ring.RingReader(fd).read()).records
    recorder.close()
    assert 0 <= second.bytes - first.bytes < 60e9


def _recorded_late(rank: int, recorder: None) -> list[tuple[int, int, str]]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model, mesh=mesh["dp"])
    for step in range(3):
        model(torch.ones(2, 8)).sum().backward()
        dist.all_reduce(torch.ones(1))
        if step == 0:  # the build is there now, and all ranks have just agreed on it
            fd = ring.create("late")
            late = install(fd, rank=rank)
            late.attach_all()
    seen = decode(ring.RingReader(fd).read())
    return [(r.group, r.seq, r.op.name) for r in seen.records]


def test_groups_that_were_made_before_are_recorded_from_the_same_operation_on():
    # The first run on a machine begins before the extension is compiled; FSDP2's groups must be seen all the same.
    with ranks(2, _recorded_late, record=False) as started:
        first, second = (started.result(rank) for rank in range(2))
    assert first == second
    assert {"ALLGATHER_BASE", "REDUCE_SCATTER_BASE", "ALLREDUCE"} <= {op for _, _, op in first}
