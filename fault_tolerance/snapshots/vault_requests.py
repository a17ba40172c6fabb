"""Requests: what a vault is asked over its sockets, by name, and how each is answered.

    anybody in the run     open fence status inventory watch read tables forget corrupt kill shutdown
    vaults                 meta push coded protected abandon
    workers of this node   attach begin staged gated give_up detach map     over the Unix socket only: descriptors come with it

Rule of this file: it parses and answers. What a request means is the vault's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fault_tolerance.coding.codec import crc32c
from fault_tolerance.snapshots.background import give_way
from fault_tolerance.snapshots.server import Connection, reply
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from fault_tolerance.snapshots.version import NodeMeta, Version, hash_bytes
from fault_tolerance.snapshots.wire import Header, Refused

if TYPE_CHECKING:
    from fault_tolerance.snapshots.attachments import Attachment
    from fault_tolerance.snapshots.vault import Vault

MAX_WATCH_S = 60.0


class Requests:
    """The table of requests of one vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        names = "open fence status inventory watch read tables forget corrupt kill shutdown"
        names += " meta push coded protected abandon attach begin staged gated give_up detach map"
        self._table: dict[str, Callable[[Connection, Header], None]] = {n: getattr(self, n) for n in names.split()}

    def handle(self, connection: Connection, header: Header) -> None:
        """Answer one request. Raises Refused, or KeyError, TypeError or ValueError for one that makes no sense."""
        answer = self._table.get(str(header.get("op")))
        if answer is None:
            raise Refused("malformed", f"vault: the request must be one of {', '.join(self._table)}")
        answer(connection, header)

    # ---- anybody in the run

    def open(self, connection: Connection, header: Header) -> None:
        """Open a generation's plan."""
        self._vault.open(SnapshotPlan.from_json(header["plan"]))
        reply(connection, self._vault.status())

    def fence(self, connection: Connection, header: Header) -> None:
        """Refuse older generations."""
        self._vault.raise_fence(int(header["generation"]))
        reply(connection)

    def status(self, connection: Connection, header: Header) -> None:
        """A summary."""
        reply(connection, self._vault.status())

    def inventory(self, connection: Connection, header: Header) -> None:
        """All that is held."""
        reply(connection, self._vault.inventory())

    def watch(self, connection: Connection, header: Header) -> None:
        """Events since a number, waiting for the first."""
        wait_s = min(float(header.get("wait_s", 0.0)), MAX_WATCH_S)
        reply(connection, {"events": self._vault.events.since(int(header["since"]), wait_s=wait_s)})

    def forget(self, connection: Connection, header: Header) -> None:
        """Drop a version that must not be restored again."""
        self._vault.drop((int(header["generation"]), int(header["step"])))
        reply(connection)

    def corrupt(self, connection: Connection, header: Header) -> None:
        """Damage a block, for drills."""
        data = bytes(connection.take())
        key = (int(header["generation"]), int(header["step"]))
        kind, index, offset = str(header["kind"]), int(header["index"]), int(header["offset"])
        self._vault.corrupt(key, kind, index, offset=offset, data=data)
        reply(connection)

    def kill(self, connection: Connection, header: Header) -> None:
        """SIGKILL a local worker."""
        reply(connection, {"alive": self._vault.attachments.kill_pid(int(header["pid"]))})

    def shutdown(self, connection: Connection, header: Header) -> None:
        """End this vault."""
        reply(connection)
        self._vault.close()

    def tables(self, connection: Connection, header: Header) -> None:
        """The hashes of a version: of all data of the group that is known here, and of this vault's parity."""
        version = self._version(header)
        with self._vault.changed:
            metas = [meta.to_wire() for meta in version.metas.values()]
            parity = {number: version.parity_hashes[number] for number in sorted(version.parity_whole)}
        parts = [payload for _, payload in metas] + [hash_bytes(hashes) for hashes in parity.values()]
        counts = {str(number): len(hashes) for number, hashes in parity.items()}
        reply(connection, {"metas": [head for head, _ in metas], "parity": counts}, parts)

    def read(self, connection: Connection, header: Header) -> None:
        """Bytes of a block, streamed; `paced` for snapshot traffic, which yields to training."""
        version = self._version(header)
        kind, index = str(header["kind"]), int(header["index"])
        offset, length = int(header["offset"]), int(header["length"])
        with self._vault.changed:
            if (kind, index) not in version.blocks():
                raise Refused("missing", f"vault {self._vault.node}: {kind} block {index} is not here")
            if not 0 <= offset <= offset + length <= version.real_bytes(kind, index):
                raise Refused("length", f"vault {self._vault.node}: {kind} block {index} has no [{offset}, +{length})")
            segment = version.data if kind == "data" else version.parity
            block = version.block(kind, index)[offset : offset + length] if length else np.empty(0, np.uint8)
        pace = self._vault.pace if header.get("paced") else None
        if pace is not None:
            give_way()
        connection.channel.send({}, length=length)
        if segment is not None and length:
            pool = self._vault.data_pool if kind == "data" else self._vault.parity_pool
            with pool.pinned(segment):
                connection.channel.send_bytes(block.data, pace=pace)

    # ---- vaults

    def meta(self, connection: Connection, header: Header) -> None:
        """A node of the group has staged: the hashes and digest of its data."""
        meta = NodeMeta.from_wire(header["meta"], connection.take())
        version = self._admitted(header)
        self._vault.add_meta(version, meta)
        reply(connection)

    def push(self, connection: Connection, header: Header) -> None:
        """A chunk of a parity block that this vault holds; answered only after the last one."""
        give_way()
        version = self._admitted(header)
        number, offset = int(header["number"]), int(header["offset"])
        segment = self._vault.parity_of(version)
        with self._vault.parity_pool.pinned(segment):
            part = version.block("parity", number)[offset : offset + connection.left]
            connection.take_into(part.data)
            if crc32c(part) != int(header["hash"]):
                raise Refused("hash", f"vault {self._vault.node}: a chunk of parity {number} does not have its hash")
        self._note(version, number, offset, int(header["hash"]), last=bool(header["last"]))
        if header["last"]:
            reply(connection)

    def _note(self, version: Version, number: int, offset: int, value: int, *, last: bool) -> None:
        plan = version.plan
        with self._vault.changed:
            length = plan.num_chunks(plan.block_bytes(version.node))
            hashes = version.parity_hashes.setdefault(number, np.zeros(length, np.uint32))
            hashes[offset // plan.chunk_bytes] = value
            if last:
                version.parity_whole.add(number)
                self._vault.changed.notify_all()

    def coded(self, connection: Connection, header: Header) -> None:
        """To the coordinator: a vault's part of a version is done, or failed."""
        version = self._admitted(header)
        reply(connection)
        self._vault.agreement.heard(version, str(header["from"]), str(header["failure"]))

    def protected(self, connection: Connection, header: Header) -> None:
        """From the coordinator: all parities are in place."""
        self._settle(connection, header)

    def abandon(self, connection: Connection, header: Header) -> None:
        """From the coordinator: this version is given up."""
        self._settle(connection, header)

    def _settle(self, connection: Connection, header: Header) -> None:
        self._vault.current(int(header["generation"]), str(header["plan"]))
        self._vault.settle(self._version(header), str(header["op"]), str(header["reason"]))
        reply(connection)

    # ---- workers of this node

    def attach(self, connection: Connection, header: Header) -> None:
        """A snapshotter comes: it gets the control page and the segments that are free."""
        self._local(connection)
        vault = self._vault
        rank, generation = int(header["rank"]), int(header["generation"])
        if rank not in vault.current(generation).ranks_on(vault.node):
            raise Refused("stranger", f"vault {vault.node}: rank {rank} sits on another node")
        attachment = vault.attachments.attach(connection, rank, generation)
        with vault.changed:
            segments = [s for s in vault.data_pool.segments() if vault.may_use(s)]
            for segment in segments:
                segment.borrowers.add(attachment)
        described = [[segment.id, segment.nbytes] for segment in segments]
        connection.channel.send({"segments": described})
        control = vault.control.reader_fd()
        try:
            connection.channel.send_fds([control])
        finally:
            os.close(control)
        for segment in segments:
            connection.channel.send_fds([segment.fd])

    def begin(self, connection: Connection, header: Header) -> None:
        """Where to copy a step's slab to."""
        segment = self._vault.begin(self._attached(connection), int(header["step"]))
        fresh = segment.id not in header["known"]
        connection.channel.send({"id": segment.id, "nbytes": segment.nbytes, "fresh": fresh})
        if fresh:
            connection.channel.send_fds([segment.fd])

    def staged(self, connection: Connection, header: Header) -> None:
        """The slab is copied."""
        facts = {"extra": dict(header["extra"]), "copy_s": float(header["copy_s"])}
        self._vault.staged(self._attached(connection), int(header["step"]), facts)
        reply(connection)

    def gated(self, connection: Connection, header: Header) -> None:
        """How long a step of this rank waited for its snapshot."""
        attachment = self._attached(connection)
        facts = {"rank": attachment.rank, "generation": attachment.generation, "step": int(header["step"])}
        self._vault.events.add("gated", **facts, stall_s=float(header["stall_s"]))
        reply(connection)

    def give_up(self, connection: Connection, header: Header) -> None:
        """A rank could not wait for the memory to copy a step into: the step's snapshot is given up everywhere."""
        attachment = self._attached(connection)
        plan = self._vault.current(attachment.generation)
        self._vault.give_up(plan, int(header["step"]), f"rank {attachment.rank}: {header['reason']}")
        reply(connection)

    def detach(self, connection: Connection, header: Header) -> None:
        """A snapshotter leaves, and has unmapped everything."""
        self._vault.attachments.detach(connection)
        reply(connection)

    def map(self, connection: Connection, header: Header) -> None:
        """The node's own bytes of a version, to read in place."""
        self._local(connection)
        with self._vault.changed:
            version = self._version(header)
            if not version.has_data or version.data is None:
                raise Refused("missing", f"vault {self._vault.node}: the node's own bytes are not here")
            fd, nbytes = version.data.reader_fd(), version.data.nbytes
        try:
            connection.channel.send({"nbytes": nbytes})
            connection.channel.send_fds([fd])
        finally:
            os.close(fd)

    # ---- who and what

    def _version(self, header: Header) -> Version:
        with self._vault.changed:
            version = self._vault.versions.get((int(header["generation"]), int(header["step"])))
        if version is None or header.get("plan", version.plan.fingerprint) != version.plan.fingerprint:
            raise Refused("missing", f"vault {self._vault.node}: step {header['step']} is not here")
        return version

    def _admitted(self, header: Header) -> Version:
        plan = self._vault.current(int(header["generation"]), str(header["plan"]))
        return self._vault.admit(plan, int(header["step"]))

    def _local(self, connection: Connection) -> None:
        if not connection.local:
            raise Refused("remote", f"vault {self._vault.node}: only processes of this machine may ask that")

    def _attached(self, connection: Connection) -> Attachment:
        self._local(connection)
        return self._vault.attachments.of(connection)

