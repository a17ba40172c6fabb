"""The record of the real engine: the same bits, all axes seen, one row per operation on every member, and no verdict."""

from __future__ import annotations

import time

import pytest

from fault_tolerance.detection.detector import Detector
from fault_tolerance.detection.timeline import meetings
from fault_tolerance.detection.verdict import Topology
from parallel.layout import Layout
from parallel.native import BuildError
from parallel.record import Phase
from parallel.recorder import Recorder
from parallel.recorder_build import load
from tests.fault_tolerance.detection.plain import transfers
from tests.parallel.ranks import Job, engine_for, step_once
from tests.parallel.record_ranks import ranks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def extension():
    try:
        return load()
    except BuildError as error:
        pytest.skip(str(error))


def _trains(rank: int, recorder: Recorder | None, job: Job, place: str) -> list[float]:
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    from parallel.mesh import Mesh

    dist.destroy_process_group()
    mesh = Mesh.connect(
        FileStore(place, job.world), rank=rank, layout=Layout.parse(job.layout), generation=1, timeout_s=60
    )
    engine = engine_for(job, mesh)
    losses = []
    for step in range(1, job.steps + 1):
        if recorder is not None:
            recorder.mark(step - 1, Phase.TRAIN)
        losses.append(step_once(job, mesh, engine, step)[0])
    if recorder is not None:
        recorder.mark(job.steps, Phase.IDLE)
    engine.close()
    mesh.close()
    return losses


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [("1x2x2", "1f1b"), ("2x2x1", "zbv_zero_bubble")],
)
def test_training_is_the_same_and_nothing_is_wrong_with_it(tmp_path, layout, schedule):
    job = Job(layout=layout, schedule=schedule, steps=12)
    with ranks(job.world, _trains, job, str(tmp_path / "plain"), record=False) as started:
        plain = [started.result(rank, 120) for rank in range(job.world)]
    detector = Detector(Topology.one_node_each(Layout.parse(layout)))
    with ranks(job.world, _trains, job, str(tmp_path / "recorded")) as started:
        found, end = [], time.monotonic() + 120
        while not all(pipe.poll() for pipe in started.results) and time.monotonic() < end:
            time.sleep(0.2)
            found += detector.observe(started.observed())
        recorded = [started.result(rank) for rank in range(job.world)]
        rings = {rank: started.ring(rank) for rank in range(job.world)}
    assert recorded == plain
    assert found == []
    assert all(ring.phase == Phase.IDLE and ring.step == job.steps for ring in rings.values())
    trained = {rank: ring for rank, ring in rings.items() if ring.head == len(ring.records)}
    assert len(trained) == job.world, "the ring is too small for this test"
    assert all(meeting.complete for meeting in meetings(rings).values())
    assert all(t.sent and t.received and t.sent.bytes == t.received.bytes for t in transfers(rings).values())
