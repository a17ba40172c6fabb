"""Vault: the process that owns a node's snapshot memory and outlives its workers.

    worker 2 --.                         .-- vault of node b          one per node; together they make, protect and
    worker 3 --+-- Unix socket, memfds --+-- vault of node c   TCP    restore snapshots, and nobody else is needed
               '--   this vault        --'-- controller

How to use it. As a process, with the run's secret on the first line of stdin; it prints one JSON line with its
address, and ends when stdin is closed:

    python -m fault_tolerance.snapshots.vault --node a --run 7f3c --listen 10.0.0.5:0

or inside a process of somebody else (threads only, no signals, no event loop):

    vault = Vault(node="a", run="7f3c", secret=secret, listen="10.0.0.5:0"); vault.start(); vault.address; vault.close()

Then `VaultClient(vault.address, run=..., secret=...)` opens a generation's plan (`open`), polls (`status`, `watch`) and
asks what it holds (`inventory`); workers stage through `Snapshotter`, and read through `Reader`.

The fence. `open(plan)` makes the plan's generation the only one that may stage, push or report here; requests of an
older one are refused. Its workers may still have segments mapped: those are not given to anybody while they do
(`arena.py`), so a stopped worker that wakes up writes into memory that no longer counts.

What is kept. Until a version of the open generation is protected, on every node: the plan's `base`. Then: the newest
protected one. Everything else goes when the next version begins; nothing goes before.

Rule of this file: versions and who may touch them. Requests are parsed in `vault_requests.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from fault_tolerance.digest_kernel import DIGEST
from fault_tolerance.hashing import HASHING
from fault_tolerance.snapshots.agreement import Agreement
from fault_tolerance.snapshots.arena import Control, Pool, Segment
from fault_tolerance.snapshots.attachments import Attachment, Attachments
from fault_tolerance.snapshots.budget import VERSIONS
from fault_tolerance.snapshots.encoder import Encoder
from fault_tolerance.snapshots.pace import Pace
from fault_tolerance.snapshots.peers import Peers
from fault_tolerance.snapshots.scrub import Housekeeper
from fault_tolerance.snapshots.server import Server
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.vault_events import VaultEvents
from fault_tolerance.snapshots.vault_requests import Requests
from fault_tolerance.snapshots.version import Key, NodeMeta, State, Version
from fault_tolerance.snapshots.wire import Refused, WireError, local_address


class Vault:
    """One node's snapshots. All methods may be called from any thread."""

    def __init__(self, *, node: str, run: str, secret: bytes, listen: str = "127.0.0.1:0") -> None:
        """Raises OSError if an address is taken: for the local one, by a live vault of the same run and node."""
        self.node, self.run, self._secret = node, run, secret
        self.changed = threading.Condition(threading.RLock())
        self.events = VaultEvents()
        self.data_pool, self.parity_pool = Pool(name=f"{run}-{node}-data"), Pool(name=f"{run}-{node}-parity")
        self.control = Control()
        self.pace = Pace(None)
        self.plan: SnapshotPlan | None = None
        self.fence = -1
        self.versions: dict[Key, Version] = {}
        self._newest = -1
        self.attachments = Attachments(node, self.data_pool, self.events)
        self.agreement = Agreement(self)
        self.closed = threading.Event()
        self.server = Server(
            [listen, local_address(run, node)], run=run, secret=secret, handle=Requests(self).handle, gone=self.attachments.gone
        )
        self.address = f"{listen.rpartition(':')[0]}:{self.server.port}"
        self.peers = self._peers({})

    def start(self) -> None:
        """Serve, in daemon threads. What this machine has not compiled yet is compiled beside it."""
        DIGEST.build_beside()
        HASHING.build_beside()
        self.server.start()
        Housekeeper(self).start()

    def close(self) -> None:
        """End all connections and free all memory. May be called twice."""
        with self.changed:
            self.closed.set()
            for version in self.versions.values():
                version.dropped = True
            self.changed.notify_all()
        self.server.close()
        self.peers.close()
        for pool in (self.data_pool, self.parity_pool):
            pool.close()
        self.control.close()
        self.attachments.close()

    # ---- generations

    def open(self, plan: SnapshotPlan) -> None:
        """Make this the plan of snapshots, and fence all older generations. Opening the same plan again is fine.

        Makes the memory for it. Raises Refused if the generation is fenced, or known with another plan.
        """
        with self.changed:
            self._check_open(plan)
            known = self.plan is not None and self.plan.fingerprint == plan.fingerprint
            if not known:
                self.fence, self.plan, self._newest = plan.generation, plan, -1
                self.pace = Pace(plan.max_rate_bytes_s)
                self.peers.close()
                self.peers = self._peers(plan.addresses)
                self.control.set("generation", plan.generation)
                self.control.set("protected", 0)
                self.refresh()
        if not known:
            self._prepare(plan)
            self.events.add("open", generation=plan.generation, plan=plan.fingerprint)

    def raise_fence(self, generation: int) -> None:
        """Refuse everything older than `generation` from now on; what is held stays, and can be read."""
        with self.changed:
            self.fence = max(self.fence, generation)
            self.control.set("generation", self.fence)
            self.refresh()

    def _check_open(self, plan: SnapshotPlan) -> None:
        if plan.run != self.run or self.node not in plan.nodes:
            raise Refused("stranger", f"vault {self.node}: the plan must be of run {self.run} and have this node")
        if plan.generation < self.fence:
            raise Refused("fenced", f"vault {self.node}: generation must be >= {self.fence}, got {plan.generation}")
        same = self.plan is not None and self.plan.generation == plan.generation
        if same and self.plan is not None and self.plan.fingerprint != plan.fingerprint:
            raise Refused("conflict", f"vault {self.node}: generation {plan.generation} has another plan already")

    def _prepare(self, plan: SnapshotPlan) -> None:
        parity = plan.group_of(self.node).m * plan.block_bytes(self.node)
        if data := plan.node_bytes(self.node):
            self.data_pool.prepare(data, number=VERSIONS, may_use=self.may_use)
        if parity:
            self.parity_pool.prepare(parity, number=VERSIONS, may_use=lambda segment: True)

    def current(self, generation: int, fingerprint: str | None = None) -> SnapshotPlan:
        """The open plan, if it is of this generation. Raises Refused."""
        plan = self.plan
        if generation < self.fence or (plan is not None and generation < plan.generation):
            raise Refused("fenced", f"vault {self.node}: generation {generation} is over, {self.fence} is the first")
        if plan is None or generation != plan.generation:
            raise Refused("unknown", f"vault {self.node}: generation {generation} is not open here")
        if fingerprint is not None and fingerprint != plan.fingerprint:
            raise Refused("conflict", f"vault {self.node}: generation {generation} has another plan")
        return plan

    # ---- a version's way

    def admit(self, plan: SnapshotPlan, step: int) -> Version:
        """The version of a step, made now if it is new; then versions that nobody needs go. Raises Refused (`busy`)."""
        with self.changed:
            key = (plan.generation, step)
            if key not in self.versions:
                self._check_room(step)
                self._newest = step
                self.drop_all(keep=self._kept())
                version = Version(plan, step, self.node, wire_mark=self.server.traffic["tcp"].sent)
                self.versions[key] = version
                Encoder(self, version).start()
                self.refresh()
            return self.versions[key]

    def _check_room(self, step: int) -> None:
        pending = [v.step for v in self.versions.values() if v.pending and v.plan is self.plan]
        if pending:
            raise Refused("busy", f"vault {self.node}: step {pending[0]} must be protected or given up before {step}")
        if step <= self._newest:
            raise Refused("old", f"vault {self.node}: a step after {self._newest} must be staged, got {step}")

    def _kept(self) -> set[Key]:
        """What must not go yet."""
        assert self.plan is not None
        mine = [v for v in self.versions.values() if v.plan is self.plan and v.state is State.PROTECTED]
        if mine:
            return {max(v.key for v in mine)}
        return {self.plan.base} if self.plan.base is not None else set()

    def drop_all(self, *, keep: set[Key]) -> None:
        """Free every version but these."""
        with self.changed:
            for key in [key for key in self.versions if key not in keep]:
                self.drop(key)

    def drop(self, key: Key) -> None:
        """Free a version, if it is here."""
        with self.changed:
            version = self.versions.pop(key, None)
            if version is None:
                return
            version.dropped = True
            for pool, segment in ((self.data_pool, version.data), (self.parity_pool, version.parity)):
                if segment is not None:
                    pool.release(segment)
            self.refresh()

    def begin(self, attachment: Attachment, step: int) -> Segment:
        """The segment that a worker copies its slab of `step` into. Raises Refused."""
        with self.changed:
            plan = self.current(attachment.generation)
            version = self.admit(plan, step)
            if version.state is not State.STAGING or attachment.rank in version.staged:
                raise Refused("old", f"vault {self.node}: rank {attachment.rank} has staged step {step} already")
            if version.data is None:
                version.data = self.data_pool.acquire(plan.node_bytes(self.node), may_use=self.may_use)
            version.data.borrowers.add(attachment)
            return version.data

    def staged(self, attachment: Attachment, step: int, facts: dict[str, Any]) -> None:
        """A worker has copied its slab. Raises Refused if the version is not waited for any more."""
        with self.changed:
            plan = self.current(attachment.generation)
            version = self.versions.get((plan.generation, step))
            if version is None or version.state is not State.STAGING:
                raise Refused("old", f"vault {self.node}: step {step} is not being staged")
            version.staged[attachment.rank] = facts
            if version.all_staged:
                version.seconds["stage"] = time.monotonic() - version.began
            self.changed.notify_all()

    def wanted(self, version: Version) -> bool:
        """Whether it is worth working on."""
        return version.pending and version.plan is self.plan and self.fence <= version.plan.generation

    def add_meta(self, version: Version, meta: NodeMeta) -> None:
        """What a node of the group says of its data."""
        with self.changed:
            version.metas[meta.node] = meta
            self.changed.notify_all()

    def parity_of(self, version: Version) -> Segment:
        """The memory for the version's parity blocks. Raises Refused if it is not wanted any more."""
        with self.changed:
            if version.dropped:
                raise Refused("old", f"vault {self.node}: step {version.step} is not kept any more")
            if version.parity is None:
                length = version.plan.group_of(self.node).m * version.plan.block_bytes(self.node)
                version.parity = self.parity_pool.acquire(length)
            return version.parity

    # ---- the coordinator's word

    def settle(self, version: Version, verdict: str, reason: str) -> None:
        """`protected`, after which older versions go, or `abandon`."""
        with self.changed:
            if not version.pending:
                return
            version.reason = reason
            version.seconds["total"] = time.monotonic() - version.began
            version.wire_bytes = self.server.traffic["tcp"].sent - version.wire_mark
            version.state = State.PROTECTED if verdict == "protected" else State.ABANDONED
            if version.state is State.PROTECTED:
                self.control.set("protected", version.step + 1)
                self.drop_all(keep={version.key})
            self.refresh()
            self.changed.notify_all()
        self.events.add("snapshot", **version.timing())

    def report(self, version: Version, *, failure: str) -> None:
        """Tell the coordinator that this vault's part is done, or will not be. Raises WireError or Refused."""
        with self.changed:
            if not failure and version.state is State.STAGED:
                version.state = State.CODED
        self.agreement.report(version, failure)

    def give_up(self, plan: SnapshotPlan, step: int, reason: str) -> None:
        """One of this node's ranks will not stage a step. If nobody can be told, the deadline does the same later."""
        with self.changed:
            version = self.versions.get((plan.generation, step))
        if version is not None and self.wanted(version):
            with suppress(WireError, Refused):
                self.report(version, failure=reason)

    def may_use(self, segment: Segment) -> bool:
        """Whether a segment is free of writers of other generations."""
        return self.plan is not None and self.attachments.only_of(self.plan.generation, segment)

    def refresh(self) -> None:
        """Tell the workers whether a new version may begin."""
        pending = any(v.pending and v.plan is self.plan for v in self.versions.values())
        open_here = self.plan is not None and self.plan.generation == self.fence
        self.control.set("ready", int(open_here and not pending))

    # ---- what is asked

    def status(self) -> dict[str, Any]:
        """A summary, for polling."""
        with self.changed:
            mine = [v for v in self.versions.values() if v.plan is self.plan]
            return {
                "node": self.node,
                "generation": -1 if self.plan is None else self.plan.generation,
                "fence": self.fence,
                "protected": max((v.step for v in mine if v.state is State.PROTECTED), default=None),
                "staged": max((v.step for v in mine if v.has_data), default=None),
                "versions": [v.timing() for v in self.versions.values()],
                "attached": self.attachments.describe(),
                "memory_bytes": self.data_pool.nbytes + self.parity_pool.nbytes,
                "bad_chunks": sum(len(v.bad) for v in self.versions.values()),
                "wire_sent": self.server.traffic["tcp"].sent,
                "wire_received": self.server.traffic["tcp"].received,
            }

    def inventory(self) -> dict[str, Any]:
        """Everything that the catalogue needs to know of this vault."""
        with self.changed:
            held = list(self.versions.values())
            return {
                "node": self.node,
                "run": self.run,
                "address": self.address,
                "generation": self.fence,
                "plans": {v.plan.fingerprint: v.plan.to_json() for v in held},
                "versions": [v.describe() for v in held if v.blocks()],
            }

    @contextmanager
    def reading(self, key: Key) -> Iterator[Version]:
        """A version that is held here; its memory is given to nobody else meanwhile. Raises ValueError if it is not."""
        with ExitStack() as stack:
            with self.changed:
                version = self.versions.get(key)
                if version is None:
                    raise ValueError(f"vault {self.node}: step {key[1]} of generation {key[0]} is not here")
                for pool, segment in ((self.data_pool, version.data), (self.parity_pool, version.parity)):
                    if segment is not None:
                        stack.enter_context(pool.pinned(segment))
            yield version

    def whole(self, generation: int) -> tuple[Key, ...]:
        """The versions of a generation of which all of this node's own bytes are here."""
        with self.changed:
            return tuple(key for key, version in self.versions.items() if key[0] == generation and version.has_data)

    def corrupt(self, key: Key, kind: str, index: int, *, offset: int, data: bytes = b"") -> None:
        """Damage a held block, for drills: flip one bit at `offset`, or write `data` there. Raises KeyError."""
        with self.changed:
            block = self.versions[key].block(kind, index)
            if data:
                block[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            else:
                block[offset] ^= 1

    def _peers(self, addresses: Any) -> Peers:
        return Peers(addresses, run=self.run, secret=self._secret, traffic=self.server.traffic["tcp"])


def _line(fd: int) -> str:
    """The next line, read without a buffer that would swallow what follows."""
    text = b""
    while not text.endswith(b"\n") and (byte := os.read(fd, 1)):
        text += byte
    return text.decode().strip()


def main(arguments: list[str] | None = None) -> None:
    """Run a vault until it is told to shut down, or its stdin is closed."""
    parser = argparse.ArgumentParser(prog="fault_tolerance.snapshots.vault", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--node", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port for peers and controller; port 0: any")
    options = parser.parse_args(arguments)
    secret = bytes.fromhex(_line(sys.stdin.fileno()))
    vault = Vault(node=options.node, run=options.run, secret=secret, listen=options.listen)
    vault.start()
    print(json.dumps({"node": vault.node, "address": vault.address, "pid": os.getpid()}), flush=True)
    threading.Thread(target=_close_at_eof, args=(vault,), daemon=True, name="owner").start()
    vault.closed.wait()


def _close_at_eof(vault: Vault) -> None:
    """The owner keeps our stdin open for as long as it lives."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    vault.close()


if __name__ == "__main__":
    main()
