"""One rank on a GPU: NCCL's mesh through its generations, and an engine that computes what the CPU's does."""

import pytest
import torch
import torch.distributed as dist

from fault_tolerance.digest import digest
from fault_tolerance.snapshots.snapshot import carrier
from framework.training.streams import seed_streams
from parallel import ring
from parallel.boxes import Box
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.record import State, decode
from parallel.recorder import install
from tests.gpu import needs_gpu
from tests.parallel.ranks import Job, engine_for, step_once
from tests.parallel.record_ranks import wait_for

pytestmark = needs_gpu


@pytest.fixture(scope="module")
def store():
    return dist.HashStore()


def connected(store, generation, device="cuda"):
    return Mesh.connect(store, rank=0, layout=Layout(), generation=generation, device=device, timeout_s=60)


def trained(store, generation, device, job, steps=5):
    mesh = connected(store, generation, device)
    engine = engine_for(job, mesh)
    losses = [step_once(job, mesh, engine, step)[0] for step in range(1, steps + 1)]
    state = {piece: tensor.cpu().clone() for piece, tensor in engine.state().items()}
    engine.close()
    mesh.close()
    return losses, state


def test_a_mesh_is_made_summed_over_and_made_again_in_the_next_generation(store):
    """`cuda` without a number could not be made the present device: no run could begin on a GPU."""
    for generation in (1, 2, 3):
        mesh = connected(store, generation)
        assert mesh.device == torch.device("cuda", 0)
        assert mesh.sum(torch.ones(3, dtype=torch.float64)).tolist() == [1.0] * 3
        assert mesh.share("here") == ["here"]
        mesh.close()
    assert not dist.is_initialized()


def test_a_mesh_that_was_severed_gives_no_sums_and_the_next_one_does(store):
    """An operation of NCCL's that is aborted ends without an error: what it should have summed must not be believed."""
    mesh = connected(store, 10)
    mesh.sum(torch.ones(1))
    mesh.sever()
    with pytest.raises((RuntimeError, ValueError)):
        mesh.sum(torch.ones(1))
    mesh.close()
    mesh.sever()  # late, from another thread: it must not reach those who came after
    after = connected(store, 11)
    mesh.sever()
    assert after.sum(torch.ones(1)).tolist() == [1.0]
    after.close()


def test_a_severed_engine_of_fsdp_is_out_and_trains_again(store):
    job = Job(wrapping={"precision": "bf16"})
    mesh = connected(store, 20)
    engine = engine_for(job, mesh)
    step_once(job, mesh, engine, 1)
    mesh.sever()
    with pytest.raises((RuntimeError, ValueError)):
        step_once(job, mesh, engine, 2)
    engine.close()
    mesh.close()
    losses, _ = trained(store, 21, "cuda", job)
    assert losses[-1] < losses[0]


def test_generations_leave_no_memory_on_the_device(store):
    used = []
    for generation in range(30, 36):
        trained(store, generation, "cuda", Job(), steps=1)
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1]


def test_fp32_on_a_gpu_has_the_losses_of_the_cpu(store):
    assert not torch.backends.cuda.matmul.allow_tf32
    there, state = trained(store, 40, "cuda", Job())
    here, wanted = trained(store, 41, "cpu", Job())
    assert there == pytest.approx(here, rel=1e-4)
    assert max(float((state[piece] - wanted[piece]).abs().max()) for piece in wanted) < 1e-3


def test_first_weights_are_the_same_bytes_on_every_device(store):
    found = [trained(store, 50 + i, device, Job(), steps=0)[1] for i, device in enumerate(("cuda", "cpu"))]
    assert all(torch.equal(found[0][piece], found[1][piece]) for piece in found[1])


def test_a_gpu_repeats_its_losses_to_the_bit(store):
    first, second = (trained(store, 60 + i, "cuda", Job())[0] for i in range(2))
    assert first == second


@pytest.mark.parametrize("compile", [False, True])
def test_bf16_trains_and_keeps_its_state_in_fp32(store, compile):
    losses, state = trained(store, 70 + compile, "cuda", Job(wrapping={"precision": "bf16", "compile": compile}))
    exact, _ = trained(store, 75 + compile, "cuda", Job())
    assert losses == pytest.approx(exact, rel=0.02)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_digest_of_equal_bytes_is_equal_wherever_they_are():
    torch.manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(33, 65).to(dtype)
        both = [digest(carrier(t).cpu().numpy(), name="param/x", box=Box.whole((33, 65))) for t in (tensor, tensor.cuda())]
        assert both[0] == both[1]


def test_operations_of_a_mesh_end_well_in_the_record(store):
    """NCCL's work has no `isSuccess` any more: every operation that had ended was noted as failed."""
    fd = ring.create("gpu")
    recorder = install(fd, rank=0, generation=80)
    if not recorder.on:
        pytest.skip(recorder.reason)
    job = Job(wrapping={"precision": "bf16"})
    mesh = connected(store, 80)
    engine = engine_for(job, mesh)
    step_once(job, mesh, engine, 1)
    torch.cuda.synchronize()

    def all_ended():
        records = decode(ring.RingReader(fd).read()).records
        return records if records and all(r.state != State.CALLED for r in records) else None

    records = wait_for(all_ended)
    assert {r.state for r in records} == {State.DONE}
    assert all(r.end_ns >= r.wait_ns > 0 for r in records if r.wait_ns)
    mesh.sever()
    recorder.abort()
    engine.close()
    mesh.close()
    recorder.close()
    assert connected(store, 81).sum(torch.ones(1)).tolist() == [1.0]
    dist.destroy_process_group()


def test_reseeding_covers_the_device():
    seed_streams(5, 7, (0, 0))
    first = torch.rand(4, device="cuda")
    seed_streams(5, 7, (0, 0))
    assert torch.equal(first, torch.rand(4, device="cuda"))

