"""What a vault does for snapshots gives way to training; what somebody waits for does not."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fault_tolerance.snapshots.background import LOWEST, STEPS, give_way
from tests.fault_tolerance.snapshots.vaults import VaultCluster, atlas_of, whole_state

CODE = """
import os, threading
from fault_tolerance.snapshots.background import give_way
def standing():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - os.getpriority(os.PRIO_PROCESS, os.getpid())
def lower():
    give_way(); give_way(); print(standing())
os.nice({nice})
for target in (lower, lambda: print(standing())):
    thread = threading.Thread(target=target); thread.start(); thread.join()
"""


@pytest.mark.parametrize("more", [0, LOWEST])
def test_a_thread_lowers_itself_and_no_other(more: int) -> None:
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    said = subprocess.run([sys.executable, "-c", CODE.format(nice=more)], capture_output=True, text=True, check=True)
    assert list(map(int, said.stdout.split())) == [min(STEPS, LOWEST - min(own + more, LOWEST)), 0]


def test_on_one_core_the_low_thread_gets_a_smaller_share_and_not_nothing() -> None:
    core = {min(os.sched_getaffinity(0))}
    block = bytes(1 << 20)
    stop, used = threading.Event(), dict[str, float]()

    def spin(name: str) -> None:
        os.sched_setaffinity(threading.get_native_id(), core)
        if name == "low":
            give_way()
        began = time.thread_time()
        while not stop.is_set():
            hashlib.sha256(block).digest()  # lets the interpreter go, as a kernel's call does
        used[name] = time.thread_time() - began

    threads = [threading.Thread(target=spin, args=(name,)) for name in ("low", "normal")]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert 0 < used["low"] < used["normal"] / 1.5


@pytest.mark.slow
def test_a_vaults_threads_that_encode_are_low_and_those_that_answer_are_not() -> None:
    with VaultCluster(2) as cluster:
        plan = cluster.plan(atlas_of("1x2x1"), tolerate=1)
        cluster.open(plan)
        cluster.protect(plan, 1, whole_state(plan.atlas, 1))
        pid = cluster.vaults["n0"].process.pid
        nice = [int(task.joinpath("stat").read_text().rpartition(")")[2].split()[16]) for task in Path(f"/proc/{pid}/task").iterdir()]
        base = os.getpriority(os.PRIO_PROCESS, pid)
        assert max(nice) > base or base == LOWEST
        assert nice.count(base) > 3, "the main thread, the listeners and those that serve workers"
