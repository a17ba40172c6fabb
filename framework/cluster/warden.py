"""Warden: the process that owns an emulated cluster and sees to it that nothing of it outlives its owner.

    driver --stdin pipe--> warden --+-- gcs_server
                             |      +-- zygote --+-- workers of every node (forked)
        control socket ------+      +-- raylet of head, n0, n1, ... (each the leader of a session)

When the pipe closes (the driver ended in whatever way, SIGKILL included) the warden kills every process below it, removes
the cluster's folder and its files in /dev/shm, and ends. It is the subreaper of all of them, so nobody escapes by being
orphaned, and they die with it (PDEATHSIG), should it be killed itself.

To kill a machine is to SIGKILL the raylet and every process of its sessions, and to empty its part of /dev/shm.

Rule of this file: standard library only, one thread, started with `python -I -S`: it must be up in milliseconds and must never
block on anything but a dying process. It knows argument lists, not Ray. Sources: prctl(2), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK_S = 0.5
KILL_DEADLINE_S = 10.0
STOP_DEADLINE_S = 5.0
prctl = ctypes.CDLL(None, use_errno=True).prctl


class Warden:
    """Owns processes by node name. Every request of the control socket is a method named `do_<name>`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.dir, self.shm = Path(spec["dir"]), Path(spec["shm"])
        self.env: dict[str, str] = spec["env"]
        self.zygote_command: list[str] = spec["zygote"]
        self.zygote_env: dict[str, str] = {**spec["zygote_env"], "RAY_RAYLET_PID": str(os.getpid())}  # whose death ends a worker
        self.book = self.dir / "book"
        self.nodes: dict[str, dict[str, str]] = {}
        self.raylets: dict[str, int] = {}
        self.state: dict[str, str] = {}
        self.template: dict[str, Any] = {}
        self.due: list[tuple[float, str, str]] = []
        self.ending = False
        (self.book / "exits").mkdir(parents=True)
        self.forks = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.forks.bind(str(self.dir / "zygote"))
        self.forks.listen(256)
        self.gcs = self._spawn(spec["gcs"], log="gcs_server")
        self.zygote = self._spawn_zygote()

    def do_template(self, template: dict[str, Any]) -> None:
        """How a raylet is started: `argv` with @NAME@ placeholders, `files` it expects, and `nodes` with what replaces them."""
        self.template = template

    def do_add(self, node: str) -> dict[str, str]:
        """Start a machine: a new one, or a dead one that comes back."""
        if self.state.get(node) in ("up", "stopped"):
            raise ValueError(f"add: node must be new or dead, got {node} which is {self.state[node]}; kill it first")
        values = self._values(node)
        for folder in (self.dir / node, self.shm / node):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        for path, text in self.template["files"].items():
            (self.dir / _fill(path, values)).write_text(text)
        (self.dir / node / "logs").mkdir()
        argv = [text for word in self.template["argv"] if (text := _fill(word, values))]
        env = {"HOLDFAST_NODE": node, "HOLDFAST_SHM_DIR": str(self.shm / node)}
        self.nodes[node], self.state[node] = values, "up"
        self.raylets[node] = self._spawn(argv, log=f"{node}/raylet", env=env)
        return values

    def do_kill(self, node: str) -> list[int]:
        """A machine crash. Every process is dead on return."""
        killed = self._kill(node)
        self.due = [item for item in self.due if item[2] != node]  # what was planned for this life is not for the next
        for path in (self.shm / node).glob("*") if node in self.state else ():
            path.unlink() if not path.is_dir() else shutil.rmtree(path, ignore_errors=True)
        self.state[node] = "dead"
        return killed

    def do_stop(self, node: str) -> list[int]:
        """SIGSTOP to the whole machine. Every process has stopped on return."""
        return self._signal(node, signal.SIGSTOP, "stopped")

    def do_cont(self, node: str) -> list[int]:
        """SIGCONT to the whole machine."""
        return self._signal(node, signal.SIGCONT, "up")

    def do_later(self, in_s: float, do: str, node: str) -> None:
        """Have something of this done to a machine after a while, whether or not whoever asked still lives then."""
        if do not in ("add", "kill", "stop", "cont", "revive"):
            raise ValueError(f"later: must be add, kill, stop, cont or revive, got {do}")
        self.due.append((time.monotonic() + in_s, do, node))

    def do_revive(self, node: str) -> None:
        """What a service manager does on the machine: start its raylet again if that has ended."""
        self._known(node)
        self._reap()
        if self.state[node] == "dead":
            self.do_add(node)

    def do_pids(self, node: str) -> list[int]:
        """Live processes of a machine, its raylet first."""
        self._known(node)
        return self._pids(node)

    def do_raylet(self, node: str) -> int:
        """The process whose life is the machine's, or 0 if it is not up."""
        self._reap()
        return self.raylets[node] if self.state.get(node) == "up" else 0

    def do_names(self) -> dict[str, str]:
        """What every machine is: up, stopped or dead."""
        self._reap()
        return dict(self.state)

    def do_describe(self) -> dict[str, object]:
        """Where things are, for `holdfast doctor` and tests."""
        return {"dir": str(self.dir), "shm": str(self.shm), "gcs": self.gcs, "zygote": self.zygote, "nodes": self.nodes}

    def do_close(self) -> None:
        """End everything."""
        self.ending = True

    def run(self) -> None:
        """Serve until the driver is gone, then leave nothing behind."""
        driver = os.getppid()
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.bind(str(self.dir / "control"))
        control.listen(64)
        with selectors.DefaultSelector() as selector:
            selector.register(control, selectors.EVENT_READ)
            selector.register(sys.stdin.buffer, selectors.EVENT_READ)
            while not self.ending and os.getppid() == driver:
                for key, _ in selector.select(self._wait_s()):
                    if key.fileobj is control:
                        with contextlib.suppress(OSError):  # whoever asks for its own machine's end does not hear the answer
                            self._answer(control)
                    elif not os.read(0, 4096):
                        self.ending = True
                self._do_due()
                self._reap()

    def finish(self) -> None:
        """Kill everything below, remove everything written."""
        deadline = time.monotonic() + KILL_DEADLINE_S
        while (rest := _descendants(os.getpid())) and time.monotonic() < deadline:
            _signal_all(rest, signal.SIGKILL)
            time.sleep(0.01)
            self._reap(respawn=False)
        shutil.rmtree(self.dir, ignore_errors=True)
        shutil.rmtree(self.shm, ignore_errors=True)  # last, for the lease in it tells the next start of whatever is left

    def _wait_s(self) -> float:
        """Until there is something to do, or it is time to look around."""
        return max(0.0, min([TICK_S, *(at - time.monotonic() for at, _, _ in self.due)]))

    def _do_due(self) -> None:
        """What was asked for later, as soon as it is time; what cannot be done any more is only said."""
        now = time.monotonic()
        ripe, self.due = [item for item in self.due if item[0] <= now], [item for item in self.due if item[0] > now]
        for _, do, node in sorted(ripe):
            try:
                getattr(self, "do_" + do)(node)
            except (ValueError, OSError) as error:
                print(f"later: {do} {node}: {error}", file=sys.stderr, flush=True)

    def _answer(self, control: socket.socket) -> None:
        channel, _ = control.accept()
        with channel, channel.makefile("rwb") as stream:
            channel.settimeout(5.0)
            try:
                request = json.loads(stream.readline())
                answer = {"ok": getattr(self, "do_" + request["do"])(**request.get("with", {}))}
            except Exception as error:  # whatever is asked wrongly, the warden lives on
                answer = {"error": f"{type(error).__name__}: {error}"}
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()

    def _values(self, node: str) -> dict[str, str]:
        given = self.template["nodes"].get(node) or {**self.template["default"], "IP": f"127.0.200.{len(self.nodes) + 1}"}
        words = {"NODE": node, "DIR": str(self.dir / node), "SHM": str(self.shm / node), "ID": os.urandom(28).hex(), "HEAD": "", "HEADFLAG": "", **given}
        labels = {"holdfast.io/node": node, **json.loads(words.get("LABELS", "{}"))}
        return {**words, "LABELS": json.dumps(labels)}

    def _known(self, node: str) -> None:
        if node not in self.state:
            raise ValueError(f"node must be one of {', '.join(self.state)}, got {node}")

    def _spawn_zygote(self) -> int:
        return self._spawn(self.zygote_command, log="zygote", env=self.zygote_env, fds=(self.forks.fileno(),))

    def _spawn(self, argv: list[str], *, log: str, env: dict[str, str] | None = None, fds: tuple[int, ...] = ()) -> int:
        argv = [word.replace('"@LISTENER@"', str(fds[0])) if fds else word for word in argv]
        with (self.dir / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(
                argv, env={**self.env, **(env or {})}, cwd=self.dir / "empty", stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, pass_fds=fds, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        process.returncode = 0  # reaped by pid in _reap, with everybody else
        return process.pid

    def _reap(self, *, respawn: bool = True) -> None:
        """Bury the dead. A machine without its raylet is none: its workers must not train on."""
        dead: set[int] = set()
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                dead.add(pid)
        if not respawn:
            return
        if self.zygote in dead:
            self.zygote = self._spawn_zygote()
        for node, raylet in self.raylets.items():
            if raylet in dead:
                self.state[node] = "dead"
            if raylet and self.state[node] == "dead":
                _signal_all(rest := self._pids(node), signal.SIGKILL)
                if not rest:
                    self.raylets[node] = 0  # the number may soon be somebody else's

    def _kill(self, node: str) -> list[int]:
        self._known(node)
        killed: dict[int, None] = {}
        deadline = time.monotonic() + KILL_DEADLINE_S
        while time.monotonic() < deadline:
            living = self._pids(node)
            if not living:
                break
            killed.update(dict.fromkeys(living))
            _signal_all(living, signal.SIGKILL)
            time.sleep(0.002)
            self._reap()
        return list(killed)

    def _signal(self, node: str, number: signal.Signals, state: str) -> list[int]:
        self._known(node)
        pids = self._pids(node)
        _signal_all(pids, number)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while number == signal.SIGSTOP and time.monotonic() < deadline:  # a process stops when it is next scheduled
            processes = _processes()
            if all(processes[pid][2] in "TtZX" for pid in pids if pid in processes):
                break
            time.sleep(0.002)
        if self.state[node] != "dead":
            self.state[node] = state
        return pids

    def _pids(self, node: str) -> list[int]:
        """The raylet's session, and the session of every worker that the zygote's book names."""
        raylet = self.raylets.get(node, 0)
        sessions = {raylet, *(int(page.name) for page in (self.book / node).glob("*"))} - {0}
        found = [pid for pid, (_, session, state) in _processes().items() if state not in "ZX" and session in sessions]
        return sorted(found, key=lambda pid: (pid != raylet, pid))


def _fill(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"@{name}@", value)
    return word


def _die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _processes() -> dict[int, tuple[int, int, str]]:
    """pid: (parent, session, state letter) of every process of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text(errors="replace")
            except OSError:
                continue
            words = text.rpartition(")")[2].split()
            found[int(folder.name)] = (int(words[1]), int(words[3]), words[0])
    return found


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in _processes().items():
        children.setdefault(parent, []).append(pid)
    found, front = [], [root]
    while front:
        below = children.get(front.pop(), [])
        found += below
        front += below
    return found


def main() -> None:
    """One JSON line on standard input says what to start; after it the pipe only has to stay open."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    warden = Warden(json.loads(line))

    def end(*_: object) -> None:
        warden.ending = True

    signal.signal(signal.SIGTERM, end)
    try:
        warden.run()
    finally:
        warden.finish()


if __name__ == "__main__":
    main()
