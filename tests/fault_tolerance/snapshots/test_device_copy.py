"""Copies off a GPU: every dtype to the bit, straight into pinned memory or through buffers, behind the work that was queued."""

import mmap

import numpy as np
import pytest
import torch

from fault_tolerance.snapshots.device_copy import DeviceCopy
from fault_tolerance.snapshots.snapshot import carrier
from tests.gpu import needs_gpu

pytestmark = needs_gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
BUFFER = 1 << 16


def host(nbytes: int) -> np.ndarray:
    """Shared memory, as a vault's."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_arrives_has_the_bits_that_were_there(dtype, pinned):
    """`.numpy()` of a bfloat16 tensor raises, so bytes are carried as integers of the same width."""
    torch.manual_seed(0)
    whole = (torch.randn(300, 500) * 100).to(dtype).cuda()
    copy = DeviceCopy(BUFFER)
    copy.begin([whole])
    kept = []  # what is pinned is unpinned by `close`, and must be there until then
    for source in (whole, whole[7:11], whole[:, 3:9], whole[2, 3], whole[:0]):
        kept.append(memory := host(max(4096, source.numel() * source.element_size())))
        assert not pinned or copy.pin(memory)
        carried = carrier(source)
        target = memory[: source.numel() * source.element_size()].view(f"u{source.element_size()}").reshape(source.shape)
        copy.copy(carried, target)
        copy.finish()
        assert np.array_equal(target, _bits(source))
    copy.close()


def _bits(source: torch.Tensor) -> np.ndarray:
    return carrier(source).cpu().contiguous().numpy().view(f"u{source.element_size()}")


@pytest.mark.parametrize("pinned", [True, False])
def test_many_pieces_at_once_all_arrive(pinned):
    source = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    memory = host(source.nbytes)
    copy = DeviceCopy(BUFFER)
    copy.begin([source])
    assert not pinned or copy.pin(memory)
    out = memory.view(np.uint32)
    for start in range(0, len(out), 10_000):
        copy.copy(source[start : start + 10_000], out[start : start + 10_000])
    copy.finish()
    copy.close()
    assert np.array_equal(out, np.arange(1 << 20, dtype=np.uint32))


def test_a_copy_sees_the_work_that_was_queued_before_it_and_holds_nothing_up():
    source = torch.zeros(1 << 22, dtype=torch.int32, device="cuda")
    copy, memory = DeviceCopy(BUFFER), host(source.nbytes)
    torch.cuda._sleep(50_000_000)
    source.fill_(7)
    copy.begin([source])
    copy.pin(memory)
    copy.copy(source, memory.view(np.uint32))
    copy.finish()
    copy.close()
    assert (memory.view(np.uint32) == 7).all()


def test_memory_that_cannot_be_pinned_is_copied_to_all_the_same():
    """A refusal of the driver's (here: pinned already) must not come back as the error of the next kernel that is launched."""
    source = torch.arange(1000, dtype=torch.int32, device="cuda")
    first, second = DeviceCopy(BUFFER), DeviceCopy(BUFFER)
    for copy in (first, second):
        copy.begin([source])
    out = host(4096)
    assert first.pin(out) and not second.pin(out)
    second.copy(source, out[:4000].view(np.uint32))
    second.finish()
    assert np.array_equal(out[:4000].view(np.uint32), np.arange(1000)) and int((source + 1).sum()) > 0
    second.close()
    first.close()
