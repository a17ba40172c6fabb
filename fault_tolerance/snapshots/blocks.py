"""Blocks: any bytes of any node of a snapshot, dead or alive, from the cheapest place, and never unverified.

    own node's bytes      mapped, hashed in place, no copy
    a living node's       from its vault; a chunk whose hash fails counts as erased
    erased or lost        k other blocks of the stripe, that range only -> decode

Rule of this file: it returns bytes whose hash was checked, or raises RestoreError. It writes nothing anywhere else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fault_tolerance.coding.codec import Codec, crc32c
from fault_tolerance.coding.placement import Stripe
from fault_tolerance.snapshots.arena import map_shared
from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.peers import Peers
from fault_tolerance.snapshots.version import Hashes, NodeMeta
from fault_tolerance.snapshots.wire import Channel, Refused, Traffic, WireError, local_address

Bytes: TypeAlias = NDArray[np.uint8]


class RestoreError(RuntimeError):
    """The snapshot cannot give these bytes: more is lost or damaged than the code can mend."""


@dataclass(slots=True)
class Counts:
    """Bytes by where they came from, and damaged chunks that were found. `fetched` is what crossed the network."""

    local: int = 0
    peer: int = 0
    decoded: int = 0
    fetched: int = 0
    bad_chunks: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, amount: int) -> None:
        """Count."""
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)


class Blocks:
    """Verified reads of one snapshot. Thread-safe."""

    def __init__(self, snapshot: Snapshot, *, node: str, run: str, secret: bytes, timeout_s: float = 10.0) -> None:
        """`node` is where the reader runs, for what is nearest. Nothing is contacted yet."""
        self.snapshot, self._plan, self._node = snapshot, snapshot.plan, node
        self.counts = Counts()
        self._traffic = Traffic()
        addresses = {holder.node: holder.address for holder in snapshot.holders}
        if node in addresses:
            addresses[node] = local_address(run, node)
        self._peers = Peers(addresses, run=run, secret=secret, timeout_s=timeout_s, traffic=self._traffic)
        self._lock = threading.Lock()
        self._down: set[str] = set()
        self._asked: set[str] = set()
        self._metas: dict[str, NodeMeta] = {}
        self._parity: dict[tuple[str, int], Hashes] = {}
        self._mapped: Bytes | None = None
        self._good: set[tuple[int, int]] = set()
        self._codecs = {group.nodes: Codec(group.k, group.m) for group in self._plan.groups}

    def prepare(self) -> None:
        """Fetch the hash tables, and map this node's own bytes if its vault has them. Raises RestoreError."""
        for group in [group for group in self._plan.groups if self._plan.block_bytes(group.nodes[0])]:
            for node in sorted(group.nodes, key=lambda n: n != self._node):
                if not set(group.nodes) <= set(self._metas):
                    self._tables(node)
            if missing := [node for node in group.nodes if node not in self._metas]:
                raise RestoreError(f"restore of step {self.snapshot.step}: nobody has the hashes of {missing}")
        holder = self.snapshot.holder(self._node)
        if holder is not None and holder.data and self._plan.node_bytes(self._node):
            self._map()

    def close(self) -> None:
        """End all connections and unmap."""
        self._peers.close()
        self._mapped = None

    def range(self, node: str, first: int, last: int) -> Bytes:
        """Bytes [first, last) of a node, which must begin and end with chunks. Possibly a view of shared memory."""
        if node == self._node and self._mapped is not None and self._in_place(first, last):
            self.counts.add("local", last - first)
            return self._mapped[first:last]
        out = np.empty(last - first, np.uint8)
        length = self._plan.block_bytes(node)
        at = first
        while at < last:
            block, offset = divmod(at, length)
            size = min(length - offset, last - at)
            self._fill(node, block, offset, out[at - first : at - first + size])
            at += size
        return out

    # ---- whole blocks and chunks

    def _chunks(self, offset: int, nbytes: int) -> Iterator[tuple[int, slice]]:
        size = self._plan.chunk_bytes
        for start in range(0, nbytes, size):
            yield (offset + start) // size, slice(start, min(start + size, nbytes))

    def _in_place(self, first: int, last: int) -> bool:
        """Whether the mapped bytes have their hashes."""
        assert self._mapped is not None
        length, at = self._plan.block_bytes(self._node), first
        while at < last:
            block, offset = divmod(at, length)
            size = min(length - offset, last - at)
            part = self._mapped[at : at + size]
            for chunk, where in self._chunks(offset, size):
                if (block, chunk) not in self._good:
                    if not self._fits(part[where], self._metas[self._node].hashes[block], chunk):
                        return False
                    self._good.add((block, chunk))
            at += size
        return True

    def _fits(self, part: Bytes, hashes: Hashes, chunk: int) -> bool:
        good = crc32c(part) == int(hashes[chunk])
        if not good:
            self.counts.add("bad_chunks", 1)
        return good

    def _fill(self, node: str, block: int, offset: int, out: Bytes) -> None:
        """A range of a data block: from its own vault, and decoded where that fails."""
        missing = self._direct(node, block, offset, out)
        if missing:
            group = self._plan.group_of(node)
            stripe = group.stripes[group.stripe_of(node, block)]
            for start, stop in _merge(missing):
                self._decode(stripe, block, offset + start, out[start:stop])
                self.counts.add("decoded", stop - start)

    def _direct(self, node: str, block: int, offset: int, out: Bytes) -> list[tuple[int, int]]:
        """Read a data block's range from its vault. Returns the parts of it that are erased."""
        holder = self.snapshot.holder(node)
        got = holder is not None and holder.data and self._read(node, "data", block, offset, out)
        if not got:
            return [(0, len(out))]
        hashes = self._metas[node].hashes[block]
        bad = [w for chunk, w in self._chunks(offset, len(out)) if not self._fits(out[w], hashes, chunk)]
        self.counts.add("peer", len(out) - sum(where.stop - where.start for where in bad))
        return [(where.start, where.stop) for where in bad]

    def _decode(self, stripe: Stripe, wanted: int, offset: int, out: Bytes) -> None:
        """A range of data block `wanted` of a stripe out of k others; chunk by chunk where damage is spread."""
        if self._decode_from(stripe, wanted, offset, out):
            return
        for _, where in self._chunks(offset, len(out)):
            if not self._decode_from(stripe, wanted, offset + where.start, out[where]):
                raise RestoreError(
                    f"restore of step {self.snapshot.step}: byte {offset + where.start} of the blocks of nodes "
                    f"{', '.join(stripe.nodes)} must be intact on {len(stripe.data)} of them, and is not"
                )

    def _decode_from(self, stripe: Stripe, wanted: int, offset: int, out: Bytes) -> bool:
        """Whether k intact blocks were found for this range; it is made whole chunks of the others, for their hashes."""
        length = self._whole(stripe, offset, len(out))
        present: dict[int, Bytes] = {}
        for position in self._candidates(stripe, wanted):
            if len(present) == len(stripe.data):
                break
            part = self._block(stripe, position, offset, length)
            if part is not None:
                present[position] = part
        if len(present) < len(stripe.data):
            return False
        codec = self._codecs[self._plan.group_of(stripe.nodes[0]).nodes]
        decoded = out if length == len(out) else np.empty(length, np.uint8)
        codec.decode({i: part.data for i, part in present.items()}, {wanted: decoded.data})
        if decoded is not out:
            out[:] = decoded[: len(out)]
        return self._proven(stripe, wanted, offset, out)

    def _whole(self, stripe: Stripe, offset: int, length: int) -> int:
        """`length`, up to the end of its last chunk in a block without an end of zeros."""
        block, chunk = self._plan.block_bytes(stripe.nodes[0]), self._plan.chunk_bytes
        return min(block - offset, -(-length // chunk) * chunk)

    def _proven(self, stripe: Stripe, wanted: int, offset: int, out: Bytes) -> bool:
        hashes = self._metas[stripe.data[wanted]].hashes[wanted]
        return all(self._fits(out[where], hashes, chunk) for chunk, where in self._chunks(offset, len(out)))

    def _candidates(self, stripe: Stripe, wanted: int) -> list[int]:
        """Positions other than the wanted one, own node first, then dealt out so that readers use different ones."""
        others = [p for p in range(len(stripe.nodes)) if p != wanted]
        turn = sum(self._node.encode()) % len(others) if others else 0
        return sorted(others[turn:] + others[:turn], key=lambda p: stripe.nodes[p] != self._node)

    def _block(self, stripe: Stripe, position: int, offset: int, length: int) -> Bytes | None:
        """A verified range of a stripe's block, padded with its zeros; None if it is not to be had."""
        node, out = stripe.nodes[position], np.zeros(length, np.uint8)
        holder = self.snapshot.holder(node)
        if position >= len(stripe.data):
            number = position - len(stripe.data)
            if holder is None or number not in holder.parity or not self._read(node, "parity", number, offset, out):
                return None
            hashes = self._parity.get((node, number))
        else:
            real = min(length, max(0, self._plan.real_bytes(node, position) - offset))
            if not real:
                return out  # beyond the node's bytes: zeros, which nobody has to keep
            if holder is None or not holder.data or not self._read(node, "data", position, offset, out[:real]):
                return None
            hashes = self._metas[node].hashes[position]
        filled = length if position >= len(stripe.data) else real
        chunks = self._chunks(offset, filled)
        if hashes is None or not all(self._fits(out[where], hashes, chunk) for chunk, where in chunks):
            return None
        return out

    # ---- vaults

    def _read(self, node: str, kind: str, index: int, offset: int, out: Bytes) -> bool:
        if kind == "parity" and (node, index) not in self._parity:
            self._tables(node)
        request = {"op": "read", "kind": kind, "index": index, "offset": offset, "length": len(out)}
        done = self._with(node, lambda channel: self._stream(channel, request, out))
        if done and node != self._node:
            self.counts.add("fetched", len(out))
        return done

    def _stream(self, channel: Channel, request: dict[str, object], out: Bytes) -> None:
        channel.send(request | self._identity())
        _, length = channel.reply()
        if length != len(out):
            raise WireError(f"a block must have {len(out)} bytes here, got {length}")
        channel.recv_into(out.data)

    def _tables(self, node: str) -> None:
        with self._lock:  # held while asking: whoever comes second wants the answer too
            if node not in self._asked and self.snapshot.holder(node) is not None:
                self._asked.add(node)
                self._with(node, lambda channel: self._take_tables(node, channel))

    def _take_tables(self, node: str, channel: Channel) -> None:
        answer, payload = channel.call({"op": "tables"} | self._identity())
        flat, at = np.frombuffer(payload, "<u4"), 0
        for head in answer["metas"]:
            size = sum(head["counts"])
            self._metas.setdefault(head["node"], NodeMeta.from_wire(head, flat[at : at + size].tobytes()))
            at += size
        for number, size in answer["parity"].items():
            self._parity[node, int(number)] = flat[at : at + size]
            at += size

    def _map(self) -> None:
        def take(channel: Channel) -> None:
            answer, _ = channel.call({"op": "map"} | self._identity())
            [fd] = channel.recv_fds(1)
            try:
                self._mapped = map_shared(fd, answer["nbytes"], write=False)
            finally:
                os.close(fd)

        self._with(self._node, take)

    def _with(self, node: str, action: Callable[[Channel], None]) -> bool:
        """Whether it worked. A vault that is gone is not asked again; one that refuses is, for other things."""
        if node in self._down:
            return False
        try:
            with self._peers.borrow(node) as channel:
                action(channel)
        except WireError:
            self._down.add(node)
            return False
        except Refused:
            return False
        return True

    def _identity(self) -> dict[str, object]:
        return {"generation": self._plan.generation, "step": self.snapshot.step, "plan": self._plan.fingerprint}


def _merge(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in parts:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


@contextmanager
def open_blocks(snapshot: Snapshot, *, node: str, run: str, secret: bytes) -> Iterator[Blocks]:
    """`Blocks`, prepared, and closed at the end."""
    blocks = Blocks(snapshot, node=node, run=run, secret=secret)
    try:
        blocks.prepare()
        yield blocks
    finally:
        blocks.close()
