"""Machines: what can be done to the emulated machines of a local cluster, from any process on this host.

Faults on demand are real: `kill` is SIGKILL for the raylet and all its workers, `stop` is SIGSTOP for all of them, and a
machine that is added again under its old name comes back empty, as a rebooted one does.

Rule of this file: a client of the warden's control socket (`framework/cluster/warden.py`); it holds no state and no process.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from framework.cluster.nodes import ClusterError

CONTROL = "HOLDFAST_CONTROL"  # environment variable of every process of a local cluster: the socket's path
ANSWER_S = 30.0
START_S = 30.0


class Machines:
    """The machines behind one control socket, whose path `Cluster.control` gives."""

    def __init__(self, control: str) -> None:
        self.control = control

    def names(self) -> dict[str, str]:
        """Each machine's state: `up`, `stopped` or `dead`. Raises ClusterError when the cluster is gone, as all of these do."""
        return dict(self._ask("names"))

    def pids(self, node: str) -> tuple[int, ...]:
        """Live processes of a machine, its raylet first."""
        return tuple(self._ask("pids", node=node))

    def answers(self, node: str) -> bool:
        """Whether a machine is up and not stopped. A fraction of a millisecond."""
        pid = self._ask("raylet", node=node)
        try:
            return bool(pid) and Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "TtZX"
        except OSError:
            return False

    def kill(self, node: str) -> tuple[int, ...]:
        """Crash a machine: every process is dead on return, its part of /dev/shm is empty. Returns their pids."""
        return tuple(self._ask("kill", node=node))

    def stop(self, node: str) -> tuple[int, ...]:
        """Freeze a machine (SIGSTOP)."""
        return tuple(self._ask("stop", node=node))

    def cont(self, node: str) -> tuple[int, ...]:
        """Thaw a machine (SIGCONT)."""
        return tuple(self._ask("cont", node=node))

    def later(self, in_s: float, do: str, node: str) -> None:
        """Have `add`, `kill`, `stop`, `cont` or `revive` (add if dead) done by the warden; the caller need not live until then."""
        self._ask("later", in_s=in_s, do=do, node=node)

    def workers(self, node: str) -> tuple[int, ...]:
        """Processes of a machine that run somebody's program: workers and what stands for the node. Not its raylet."""
        pages = (Path(self.control).parent / "book" / node).glob("*")
        return tuple(sorted(int(page.name) for page in pages if page.name.isdigit()))

    def add(self, node: str) -> None:
        """Start a new machine, or a dead one again. Returns when its raylet answers; Ray lists it some 0.1 s later."""
        folder = self.launch(node)
        deadline = time.monotonic() + START_S
        while not _listens(f"{folder}/raylet"):
            if self.names().get(node) == "dead" or time.monotonic() > deadline:
                log = Path(folder, "raylet.log")
                raise ClusterError(f"add: the raylet of {node} must come up within {START_S:.0f} s, it did not; see {log}")
            time.sleep(0.02)

    def configure(self, template: dict[str, Any]) -> None:
        """How a raylet is started (`framework/cluster/raylets.py`)."""
        self._ask("template", template=template)

    def launch(self, node: str) -> str:
        """`add` without waiting. Returns the node's folder."""
        return str(self._ask("add", node=node)["DIR"])

    def shm_dir(self, node: str) -> str:
        """The machine's own folder in /dev/shm. It is emptied by `kill` and gone when the cluster is."""
        return f"{self._ask('describe')['shm']}/{node}"

    def exit_status(self, pid: int, *, wait_s: float = 0.0) -> tuple[int, bool] | None:
        """How a worker process ended: its exit code (minus the signal), and whether the kernel ran out of memory meanwhile.

        None while it lives, or if it was not a worker of this cluster.
        """
        exits = Path(self.control).parent / "book" / "exits"
        deadline = time.monotonic() + wait_s
        while True:
            try:
                code, kills = (exits / str(pid)).read_text().split()
                before = int((exits / "oom").read_text())
                return int(code), int(kills) > before
            except (OSError, ValueError):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.01)

    def _ask(self, what: str, **options: Any) -> Any:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.settimeout(ANSWER_S)
                channel.connect(self.control)
                with channel.makefile("rwb") as stream:
                    stream.write(json.dumps({"do": what, "with": options}).encode() + b"\n")
                    stream.flush()
                    answer = json.loads(stream.readline())
        except (OSError, ValueError) as error:
            raise ClusterError(f"{self.control}: the local cluster's warden must answer, got {error!r}") from error
        if "error" in answer:
            raise ClusterError(f"{what}: {answer['error']}")
        return answer["ok"]


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(path)
        except OSError:
            return False
    return True
