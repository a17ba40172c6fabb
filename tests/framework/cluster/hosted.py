"""Objects that the cluster's tests host in actors."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from typing import Any


class Thing:
    """Answers, waits, fails and dies on request."""

    def __init__(self, *, start: int = 0) -> None:
        self.value = start
        print(f"made with {start}", flush=True)

    def add(self, number: int, *, twice: bool = False) -> int:
        """A call with arguments of both kinds."""
        return self.value + number * (2 if twice else 1)

    def sleep(self, seconds: float) -> str:
        """Blocks its lane."""
        time.sleep(seconds)
        return "slept"

    def thread(self) -> int:
        """Which thread runs this."""
        return threading.get_ident()

    def fail(self) -> None:
        """Raises what no other process could unpickle."""

        class Odd(ValueError):
            def __init__(self, *, needed: int) -> None:
                super().__init__(f"odd {needed}")

        raise Odd(needed=3)

    def leave(self, code: int) -> None:
        """Ends the process with an exit code."""
        os._exit(code)

    def crash(self) -> None:
        """Ends the process with a segmentation fault."""
        ctypes.string_at(0)

    def speak(self, text: str) -> None:
        """Prints from Python and from a child process."""
        print(text, flush=True)
        subprocess.run(["echo", f"child {text}"], check=True)

    def spawn(self) -> int:
        """Leaves a child process behind in a session of its own. Returns its pid."""
        return subprocess.Popen(["sleep", "600"], start_new_session=False).pid

    def surroundings(self) -> dict[str, Any]:
        """What a worker can be misled by."""
        import launch
        import parallel.layout

        return {
            "path": sys.path,
            "cwd": os.getcwd(),
            "launch": launch.__file__,
            "parallel": parallel.layout.__file__,
            "env": {
                k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "HOLDFAST_NODE", "HOLDFAST_SHM_DIR", "PYTHONSAFEPATH")
            },
        }

    def random(self) -> tuple[int, int]:
        """Draws that must differ between workers."""
        import random

        import numpy

        return random.getrandbits(60), int(numpy.random.randint(1 << 60))


class Unmakeable:
    """Its constructor fails."""

    def __init__(self) -> None:
        raise RuntimeError("no such thing")


class Director:
    """A controller: finds its crew through `Cluster.inside`."""

    def __init__(self, *, run_id: str) -> None:
        from framework.cluster.cluster import Cluster

        self.cluster = Cluster.inside(run_id)

    def crew(self) -> tuple[list[str], list[str]]:
        """Ids of the workers and nodes of the vaults that it can find."""
        return sorted(self.cluster.workers()), sorted(self.cluster.vaults())

    def ask(self, worker_id: str, number: int) -> int:
        """Calls a worker that another process has started."""
        return int(self.cluster.workers()[worker_id].call("add", number).result(60))

    def pid(self) -> int:
        """This process."""
        return os.getpid()
