"""A hung process is asked what it does, from outside, and no answer is an answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fault_tolerance.detection import stacks
from fault_tolerance.detection.stacks import innermost, stack_of, thread_first

HANGS = """
import ctypes, sys, time
from fault_tolerance.detection.stacks import arm
held = arm(sys.argv[1])
def stuck_here():
    print("ready", flush=True)
    {how}
stuck_here()
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(how: str) -> subprocess.Popen[str]:
        code = HANGS.format(how=how)
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "armed"], stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.stdout.readline()
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_py_spy_sees_a_rank_that_holds_its_interpreter_lock(start):
    process = start("ctypes.PyDLL(None).sleep(3600)")
    told = stack_of(process.pid)
    if "py-spy" in told and told.startswith("no stack"):
        pytest.skip(told)
    assert "stuck_here" in told and "stuck_here" in innermost(told)


def test_without_py_spy_the_rank_answers_the_signal(start, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "_by_py_spy", lambda pid, timeout_s: ("", "py-spy is not installed"))
    process = start("time.sleep(3600)")
    assert "stuck_here" in stack_of(process.pid, armed=tmp_path / "armed")
    assert process.poll() is None, "the signal must not end it"


def test_a_stopped_rank_is_not_waited_for(start, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "_by_py_spy", lambda pid, timeout_s: ("", "py-spy is not installed"))
    process = start("time.sleep(3600)")
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert "the process is stopped" in stack_of(process.pid, armed=tmp_path / "armed")


def test_a_dead_rank_has_no_stack():
    assert "is gone" in stack_of(2**22 + 1)


def test_the_thread_that_trains_comes_first_in_both_formats():
    # A worker's main thread waits for calls; the frame that was told of a hung rank was always that one.
    spy = 'Process 1: x\nPython v3\n\nThread 1 (idle): "Main"\n    loop (w.py:1)\nThread 2 (idle): "D"\n    _hang (f.py:7)\n    _train (w.py:2)\n'
    assert innermost(thread_first(spy, "_train")) == "_hang (f.py:7)"
    handler = 'Thread 0x1 (most recent call first):\n  File "w.py", line 1 in loop\n\nCurrent thread 0x2 (most recent call first):\n  File "f.py", line 7 in _hang\n  File "w.py", line 2 in _train\n'
    assert innermost(thread_first(handler, "_train")) == 'File "f.py", line 7 in _hang'
    assert innermost(thread_first(spy, "nowhere")) == "loop (w.py:1)"
