"""The memory of the records belongs to who outlives the ranks, and is read while they run, hang or are dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fault_tolerance.detection.rings import Rings
from parallel.native import BuildError
from parallel.record import Phase, decode
from parallel.recorder_build import load

WRITER = """
import sys, time
from parallel.record import Phase
from parallel.recorder import install
recorder = install(sys.argv[1], rank=3, generation=7)
recorder.mark(5, Phase.TRAIN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_ring_that_was_lent_tells_what_a_killed_process_did() -> None:
    try:
        load()
    except BuildError as error:
        pytest.skip(str(error))
    rings = Rings()
    path = rings.lend(7, [2, 3])[3]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        alive = decode(rings.read(7)[3])
        assert (alive.rank, alive.generation, alive.step, alive.phase) == (3, 7, 5, Phase.TRAIN)
        assert not alive.dead
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert decode(rings.read(7)[3]).dead
        assert rings.read(7)[2] == b""  # nobody ever wrote there
    finally:
        writer.kill()
        writer.wait()
        rings.close()


def test_only_the_newest_generation_is_read_and_nothing_is_left_open() -> None:
    rings = Rings()
    before = len(os.listdir("/proc/self/fd"))
    for generation in range(5):
        rings.lend(generation, range(4))
    assert rings.read(3) == {}
    assert set(rings.read(4)) == {0, 1, 2, 3}
    rings.close()
    assert len(os.listdir("/proc/self/fd")) == before
