"""Several hosts on one machine: network namespaces on a bridge, whose ways can be made slow or cut.

    with Hosts(4) as hosts:  hosts.slow_way(0, 2, "100mbit"); hosts.cut(3)      in a process:  hosts.enter(1)
    with Boxes(4) as boxes:  subprocess.run(boxes.command(1, ["hostname"]));    boxes.crash(2)

Hosts have a network of their own; boxes besides processes, a name, /etc/hosts and /dev/shm.

Needs root, iproute2 and the kernel's veth, bridge, htb. `why_not()` tells what is missing, so that tests can skip.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

INTERFACE = "eth0"
INIT = """
import os, time
os.write(1, b"up\\n")
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"""


class Hosts:
    """Namespaces `0..num-1`, with addresses 10.77.0.1 and up. Gone with the context."""

    def __init__(self, num: int) -> None:
        self.num = num
        self._prefix = f"hf{secrets.token_hex(2)}"

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [self.name(i) for i in range(self.num)] + [self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @property
    def _switch(self) -> str:
        return f"{self._prefix}sw"

    def name(self, host: int) -> str:
        return f"{self._prefix}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def enter(self, host: int) -> None:
        """Move this process (a single thread yet) onto a host."""
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        with Path(f"/run/netns/{self.name(host)}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) != 0:
                raise OSError(ctypes.get_errno(), "hosts: setns failed")

    def slow_way(self, source: int, target: int, rate: str) -> None:
        """What `source` sends to `target` passes at `rate` (tc's units)."""
        self._shape(source)
        self._tc(source, f"class replace dev {INTERFACE} parent 1: classid 1:{target + 20} htb rate {rate} burst 32k")
        self._tc(
            source,
            f"filter add dev {INTERFACE} parent 1: protocol ip prio 1 u32 match ip dst {self.address(target)}/32"
            f" flowid 1:{target + 20}",
        )

    def slow_sender(self, host: int, rate: str) -> None:
        """Everything that a host sends passes at `rate`."""
        self._tc(host, f"qdisc replace dev {INTERFACE} root tbf rate {rate} burst 64kb latency 100ms")

    def slow_receiver(self, host: int, rate: str) -> None:
        """Everything that a host receives passes at `rate`."""
        _ip(f"netns exec {self._switch} tc qdisc replace dev v{host} root tbf rate {rate} burst 64kb latency 100ms")

    def drop_way(self, source: int, target: int) -> None:
        """What `source` sends to `target` is lost in silence."""
        _ip(
            f"netns exec {self.name(source)} ip neigh replace {self.address(target)}"
            f" lladdr 02:00:00:00:00:fe dev {INTERFACE} nud permanent"
        )

    def fast_again(self, host: int) -> None:
        """What a host sends is not limited any more."""
        self._tc(host, f"qdisc del dev {INTERFACE} root")

    def restore_way(self, source: int, target: int) -> None:
        """The opposite of `drop_way`."""
        _ip(f"netns exec {self.name(source)} ip neigh del {self.address(target)} dev {INTERFACE}")

    def cut(self, host: int) -> None:
        """A host is cut off in silence."""
        _ip(f"netns exec {self._switch} ip link set v{host} nomaster")

    def join(self, host: int) -> None:
        """The opposite of `cut`."""
        _ip(f"netns exec {self._switch} ip link set v{host} master br0")

    def _make(self) -> None:
        _ip(f"netns add {self._switch}")
        _ip(f"-n {self._switch} link add br0 type bridge")
        _ip(f"-n {self._switch} link set br0 up")
        for i in range(self.num):
            name = self.name(i)
            _ip(f"netns add {name}")
            _ip(f"-n {name} link add {INTERFACE} type veth peer name v{i} netns {self._switch}")
            _ip(f"-n {name} addr add {self.address(i)}/24 dev {INTERFACE}")
            _ip(f"-n {name} link set lo up")
            _ip(f"-n {name} link set {INTERFACE} up")
            _ip(f"-n {name} route add default dev {INTERFACE}")  # programs ask for it to learn their own address
            _ip(f"-n {self._switch} link set v{i} master br0 up")

    def _shape(self, host: int) -> None:
        self._tc(host, f"qdisc replace dev {INTERFACE} root handle 1: htb default 10")
        self._tc(host, f"class replace dev {INTERFACE} parent 1: classid 1:10 htb rate 40gbit")

    def _tc(self, host: int, command: str) -> None:
        _ip(f"netns exec {self.name(host)} tc {command}")


class Boxes(Hosts):
    """Hosts with processes of their own: when the first process of one ends, all of them are gone."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self._folder = Path(tempfile.mkdtemp(prefix="hfbox"))
        self._inits: dict[int, subprocess.Popen[bytes]] = {}

    def __exit__(self, *_: object) -> None:
        for host in list(self._inits):
            self.crash(host)
        super().__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def boot(self, host: int) -> None:
        """Bring a host up, or up again."""
        files = {"hosts": f"127.0.0.1 localhost\n{self.address(host)} host{host}\n", "resolv": "nameserver 127.0.0.1\noptions timeout:1\n"}
        for name, text in files.items():
            (self._folder / f"{name}{host}").write_text(text)
        (self._folder / "init.py").write_text(INIT)
        script = (
            "mount -t tmpfs tmpfs /dev/shm && mount --bind $0/hosts$1 /etc/hosts && mount --bind $0/resolv$1 /etc/resolv.conf"
            " && hostname host$1 && exec $2 -I -S $0/init.py"
        )
        unshare = ["unshare", "-m", "-u", "-p", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(host), *unshare, "sh", "-c", script, str(self._folder), str(host), sys.executable],
            stdout=subprocess.PIPE,
        )
        self._inits[host] = process
        assert process.stdout is not None
        if process.stdout.readline() != b"up\n":
            raise OSError(f"hosts: host {host} did not come up")

    def crash(self, host: int) -> None:
        """Every process of a host is gone on return, and its /dev/shm with them."""
        process = self._inits.pop(host)
        first = self._first(process.pid)
        process.kill()
        process.wait()
        while Path(f"/proc/{first}").exists():  # its namespace ends with it
            time.sleep(0.01)

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """A command line, to be run on a host."""
        first = self._first(self._inits[host].pid)
        return ["nsenter", "-t", str(first), "-n", "-m", "-u", "-p", f"--wd={os.getcwd()}", *argv]

    def _make(self) -> None:
        super()._make()
        for host in range(self.num):
            self.boot(host)

    @staticmethod
    def _first(pid: int) -> int:
        """The process that `unshare` forked: number 1 of its namespace."""
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def why_not() -> str | None:
    """What keeps this machine from emulating hosts; None if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (iproute2)"
    try:
        with Hosts(2) as hosts:
            hosts.slow_way(0, 1, "100mbit")
            hosts.slow_receiver(1, "100mbit")
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        return f"network namespaces do not work here: {told.decode().strip()[:200]}"
    return None


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
