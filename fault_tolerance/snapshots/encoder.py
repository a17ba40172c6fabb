"""Encoder: brings one version from staged to coded, in a thread of its vault.

    wait until all local ranks have staged
      -> hash and digest the node's bytes, tell the group           the group can now speak for this node
      -> for the stripes where this node is first parity:
            k streams in, chunk by chunk:   check hash -> encode m parities -> keep one, pass m - 1 on
      -> tell the coordinator                                       who says `protected` when all have said so

Gathering at one place and passing parities on costs n D (n-1) / (n-m) bytes on the wire per snapshot, the least that
is known; one chunk of each block is in memory at a time, and the sockets' buffers keep all k streams flowing.

A stripe that fails (a peer that is slow or gone, a hash that does not fit) is tried again, then the version is given
up with the reason; the versions before it are not touched.

Rule of this file: transfer and encoding. When a version may be freed is the vault's matter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np

from fault_tolerance.coding.codec import Codec, crc32c
from fault_tolerance.coding.placement import Group, Stripe
from fault_tolerance.snapshots.arena import Pool, Segment
from fault_tolerance.snapshots.background import give_way
from fault_tolerance.snapshots.pace import Pace
from fault_tolerance.snapshots.peers import Peers
from fault_tolerance.snapshots.version import Bytes, NodeMeta, State, Version, make_meta
from fault_tolerance.snapshots.wire import Channel, Refused, WireError

TRIES = 3
RETRY_S = 0.2
WAIT_S = 0.5


class Cancelled(Exception):
    """The version is not wanted any more."""


class StripeFailed(RuntimeError):
    """A stripe could not be encoded this time."""


class Host(Protocol):
    """What the encoder needs of its vault."""

    changed: threading.Condition
    peers: Peers
    pace: Pace
    parity_pool: Pool

    def wanted(self, version: Version) -> bool: ...

    def add_meta(self, version: Version, meta: NodeMeta) -> None: ...

    def parity_of(self, version: Version) -> Segment: ...

    def report(self, version: Version, *, failure: str) -> None: ...


class Encoder:
    """One version's way to `coded`. `start` returns at once; the thread ends by itself or when it is cancelled."""

    def __init__(self, host: Host, version: Version) -> None:
        self._host, self._version = host, version
        self._plan, self._node = version.plan, version.node
        self._group: Group = self._plan.group_of(self._node)

    def start(self) -> None:
        """Begin, in a daemon thread."""
        threading.Thread(target=self._run, daemon=True, name=f"encode-{self._version.step}").start()

    def _run(self) -> None:
        give_way()
        try:
            self._wait(lambda: self._version.all_staged)
            with self._timed("hash"):
                self._speak()
            with self._timed("encode"):
                for stripe, number in self._group.parities_of(self._node):
                    if number == 0:
                        self._retry(lambda s=stripe: self._encode(self._group.stripes[s]))  # type: ignore[misc]
            self._retry(lambda: self._host.report(self._version, failure=""))
        except Cancelled:
            return
        except (StripeFailed, WireError, Refused) as error:
            self._fail(str(error))
        except Exception as error:  # a thread's last resort: its version must not stay pending in silence
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        try:
            if self._host.wanted(self._version):
                self._host.report(self._version, failure=reason)
        except (WireError, Refused):
            return  # the coordinator is gone too: its generation is over

    def _speak(self) -> None:
        """Hash, digest, and let the group know."""
        version = self._version
        extras = {str(rank): item.get("extra", {}) for rank, item in version.staged.items()}
        meta = make_meta(version, extras)
        self._check()
        with self._host.changed:
            version.state = State.STAGED
        self._host.add_meta(version, meta)
        if self._group.m:
            for peer in self._group.nodes:
                if peer != self._node:
                    self._retry(lambda p=peer: self._tell(p, meta))  # type: ignore[misc]

    def _tell(self, peer: str, meta: NodeMeta) -> None:
        header, payload = meta.to_wire()
        self._host.peers.call(peer, self._request("meta") | {"meta": header}, payload)

    def _encode(self, stripe: Stripe) -> None:
        self._wait(lambda: all(node in self._version.metas for node in stripe.data))
        segment = self._host.parity_of(self._version)
        with self._host.parity_pool.pinned(segment), ExitStack() as stack:
            try:
                _StripeJob(self._host, self._version, stripe, stack).run(self._check)
            except (Refused, WireError) as error:  # inside the stack, so that no half-read connection is kept
                raise StripeFailed(f"stripe {stripe.index} of step {self._version.step}: {error}") from error

    def _request(self, op: str) -> dict[str, object]:
        return request(op, self._version)

    def _retry(self, action: Callable[[], None]) -> None:
        for attempt in range(TRIES):
            try:
                return action()
            except (StripeFailed, WireError):
                self._check()
                if attempt == TRIES - 1:
                    raise
                time.sleep(RETRY_S * 2**attempt)
        return None

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._host.changed:
            while not condition():
                self._check()
                self._host.changed.wait(WAIT_S)
        self._check()

    def _check(self) -> None:
        if not self._host.wanted(self._version):
            raise Cancelled

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._version.seconds[name] = time.monotonic() - began


def request(op: str, version: Version) -> dict[str, object]:
    """The identity that every message about a version carries, besides the run, which the connection has proven."""
    return {
        "op": op,
        "generation": version.plan.generation,
        "step": version.step,
        "plan": version.plan.fingerprint,
        "from": version.node,
    }


class _StripeJob:
    """Streams one stripe through: k blocks in, m parities out."""

    def __init__(self, host: Host, version: Version, stripe: Stripe, stack: ExitStack) -> None:
        self._host, self._version, self._stripe = host, version, stripe
        plan, node = version.plan, version.node
        self._group = plan.group_of(node)
        self._replica = self._group.k == self._group.m == 1  # the parity is the block itself, and is received in its place
        self._length, self._chunk = plan.block_bytes(node), plan.chunk_bytes
        self._blocks = [(n, _block(self._group, n, stripe.index)) for n in stripe.data]
        self._real = [plan.real_bytes(n, b) for n, b in self._blocks]
        size = min(self._chunk, self._length)
        self._data = [] if self._replica else [np.empty(size, np.uint8) for _ in stripe.data]
        self._parity = [np.empty(size, np.uint8) for _ in stripe.parity[1:]]
        self._sources = [stack.enter_context(host.peers.borrow(n)) if r else None for n, r in self._from()]
        self._sinks = [stack.enter_context(host.peers.borrow(n)) for n in stripe.parity[1:]]

    def _from(self) -> Iterator[tuple[str, int]]:
        return zip(self._stripe.data, self._real, strict=True)

    def run(self, check: Callable[[], None]) -> None:
        codec, hashes = Codec(self._group.k, self._group.m), list[int]()
        for channel, (node, block), real in zip(self._sources, self._blocks, self._real, strict=True):
            if channel is not None:
                self._ask(channel, node, block, real)
        for chunk, start in enumerate(range(0, self._length, self._chunk)):
            check()
            length = min(self._chunk, self._length - start)
            own = self._version.block("parity", 0)[start : start + length]
            if self._replica:
                hashes.append(self._receive(0, chunk, start, own))
                continue
            for index, buffer in enumerate(self._data):
                self._receive(index, chunk, start, buffer[:length])
            parity = [own, *(buffer[:length] for buffer in self._parity)]
            codec.encode([buffer[:length].data for buffer in self._data], [p.data for p in parity])
            hashes.append(crc32c(own))
            for number, (sink, part) in enumerate(zip(self._sinks, parity[1:], strict=True), start=1):
                self._push(sink, number, start, part)
        for sink in self._sinks:
            sink.reply()
        self._keep(np.array(hashes, np.uint32))

    def _ask(self, channel: Channel, node: str, block: int, real: int) -> None:
        wanted = {"kind": "data", "index": block, "offset": 0, "length": real, "paced": True}
        channel.send(request("read", self._version) | wanted)
        _, length = channel.reply()
        if length != real:
            raise WireError(f"block {block} of node {node} must have {real} bytes, got {length}")

    def _receive(self, index: int, chunk: int, start: int, buffer: Bytes) -> int:
        """Fill `buffer` with a chunk of a block, whose hash is right, and the zeros behind its end. Returns the hash of both
        where it is kept: of a replica.
        """
        real = max(0, min(len(buffer), self._real[index] - start))
        channel, value = self._sources[index], 0
        if channel is not None and real:
            channel.recv_into(buffer[:real].data)
            value = crc32c(buffer[:real])
            node, block = self._blocks[index]
            if value != int(self._version.metas[node].hashes[block][chunk]):
                raise StripeFailed(f"chunk {chunk} of block {block} of node {node} does not have its hash")
        buffer[real:] = 0
        return crc32c(buffer[real:], value) if self._replica and real < len(buffer) else value

    def _push(self, sink: Channel, number: int, start: int, part: Bytes) -> None:
        last = start + len(part) >= self._length
        header = {"number": number, "offset": start, "hash": crc32c(part), "last": last}
        self._host.pace(len(part))
        sink.send(request("push", self._version) | header, [part.data])

    def _keep(self, hashes: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
        with self._host.changed:
            self._version.parity_hashes[0] = hashes
            self._version.parity_whole.add(0)
            self._host.changed.notify_all()


def _block(group: Group, node: str, stripe: int) -> int:
    block = group.block_of(node, stripe)
    assert block is not None, f"{node} holds data of stripe {stripe}"
    return block
