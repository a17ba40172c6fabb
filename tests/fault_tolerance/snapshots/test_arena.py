import mmap
import os

import numpy as np
import pytest

from fault_tolerance.snapshots.arena import CONTROL_WORDS, PAGE, Control, Pool, Segment, map_shared


def test_what_one_process_writes_another_reads():
    segment = Segment(10_000, name="t")
    assert segment.nbytes == 3 * PAGE
    if os.fork() == 0:
        map_shared(segment.fd, segment.nbytes, write=True)[9_999] = 42
        os._exit(0)
    os.wait()
    assert segment.view[9_999] == 42
    segment.close()


def test_a_readers_descriptor_cannot_be_written_through():
    segment = Segment(PAGE, name="t")
    fd = segment.reader_fd()
    assert not map_shared(fd, PAGE, write=False).flags.writeable
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    segment.close()


def test_segments_are_used_again_and_never_while_in_use():
    pool = Pool(name="t")
    a, b = pool.acquire(5000), pool.acquire(5000)
    assert a is not b
    pool.release(a)
    assert pool.acquire(5000) is a
    assert pool.nbytes == 4 * PAGE
    pool.close()


def test_a_segment_that_a_thread_still_uses_is_not_given_away():
    pool = Pool(name="t")
    a = pool.acquire(PAGE)
    with pool.pinned(a):
        pool.release(a)
        assert pool.acquire(PAGE) is not a
    assert pool.acquire(PAGE) is a
    pool.close()


def test_a_segment_that_an_old_writer_still_has_is_left_to_him():
    """A worker that was stopped before its generation ended may wake up and write: not into what counts."""
    pool = Pool(name="t")
    a = pool.acquire(PAGE)
    a.borrowers.add("stopped worker")
    mapping = map_shared(a.fd, PAGE, write=True)
    pool.release(a)
    b = pool.acquire(PAGE, may_use=lambda segment: not segment.borrowers)
    mapping[:] = 7
    assert b is not a
    assert not b.view.any()
    assert pool.nbytes == PAGE
    pool.close()


def test_memory_for_another_plan_replaces_what_is_free():
    pool = Pool(name="t")
    pool.prepare(PAGE, number=2, may_use=lambda segment: True)
    used = pool.acquire(PAGE)
    pool.prepare(3 * PAGE, number=2, may_use=lambda segment: True)
    assert sorted(s.nbytes for s in pool.segments()) == [PAGE, 3 * PAGE]
    pool.release(used)
    grown = [pool.acquire(3 * PAGE), pool.acquire(3 * PAGE)]
    assert pool.nbytes == 6 * PAGE
    assert used not in grown
    pool.close()


def test_pages_are_there_before_the_first_copy():
    segment = Segment(64 * PAGE, name="t")
    assert os.fstat(segment.fd).st_blocks * 512 == 64 * PAGE
    segment.close()


def test_nothing_is_left_when_all_is_let_go():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        pool, control = Pool(name="t"), Control()
        pool.acquire(1 << 20)
        os.close(control.reader_fd())
        pool.close()
        control.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert "holdfast-t" not in maps.read()


def test_a_reader_sees_the_control_words_change():
    control = Control()
    fd = control.reader_fd()
    words = map_shared(fd, PAGE, write=False).view(np.uint64)
    os.close(fd)
    for value, word in enumerate(CONTROL_WORDS, start=5):
        control.set(word, value)
    assert list(words[: len(CONTROL_WORDS)]) == [5, 6, 7]
    del words
    control.close()
