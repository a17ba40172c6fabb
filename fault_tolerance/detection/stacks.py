"""Stacks: what a rank that hangs is doing, asked from outside.

    py-spy there and allowed:   py-spy dump --pid          sees a rank that holds its interpreter lock, or is stopped
    else                        SIGUSR2 -> faulthandler    armed by the rank at its start; sees all but a stopped one

Rule of this file: it never waits long and never raises: no stack is an answer, with the reason.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

SIGNAL = signal.SIGUSR2
_FRAME = re.compile(r'^\s+(?:\S.* \(.*:\d+\)|File ".*", line \d+.*)$', re.MULTILINE)  # py-spy's, faulthandler's


def arm(path: str | os.PathLike[str]) -> IO[str]:
    """In the rank: let SIGUSR2 append all Python stacks to a file. Keep what it returns as long as the rank lives."""
    file = Path(path).open("a")  # noqa: SIM115 faulthandler writes to it as long as the process lives
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    return file


def stack_of(pid: int, *, armed: str | os.PathLike[str] | None = None, timeout_s: float = 5.0) -> str:
    """The Python stacks of a process on this machine, or one line that says why there are none.

    `armed` is the file that the process gave to `arm`. Costs up to `timeout_s`; the process stops for milliseconds.
    """
    state = _state(pid)
    if state is None:
        return f"no stack: process {pid} is gone"
    told, why = _by_py_spy(pid, timeout_s)
    if told:
        return told
    if armed is None or state == "T":
        return f"no stack: {why}; the process is {'stopped' if state == 'T' else 'not armed'}"
    return _by_signal(pid, Path(armed), timeout_s) or f"no stack: {why}; and no answer to the signal in {timeout_s:g} s"


def thread_first(stack: str, word: str) -> str:
    """The same stacks, but first of all the thread whose stack has this word in it, where there is one."""
    parts = re.split(r"(?m)^(?=(?:Current )?[Tt]hread )", stack)
    head, threads = parts[0], parts[1:]
    return head + "".join(sorted(threads, key=lambda text: word not in text))


def innermost(stack: str) -> str:
    """The innermost frame of the first thread of a stack, for a one-line evidence; the first line if there is no frame."""
    frame = _FRAME.search(stack)
    return (frame.group(0) if frame else stack.strip().partition("\n")[0]).strip()


def _state(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def _by_py_spy(pid: int, timeout_s: float) -> tuple[str, str]:
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return "", "py-spy is not installed"
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return "", f"py-spy: {type(error).__name__}"
    if done.returncode == 0 and "Thread" in done.stdout:
        return done.stdout, ""
    return "", "py-spy: " + (done.stderr.strip().splitlines() or ["no threads"])[-1][:200]


def _by_signal(pid: int, armed: Path, timeout_s: float) -> str:
    before = armed.stat().st_size if armed.exists() else 0
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, SIGNAL)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            time.sleep(0.05)
            if armed.exists() and armed.stat().st_size > before:
                time.sleep(0.1)
                with armed.open() as file:
                    file.seek(before)
                    return file.read()
    return ""
