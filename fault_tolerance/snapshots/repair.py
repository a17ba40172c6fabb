"""Repair: a damaged chunk of a held block is made again out of the same chunk of k other blocks of its stripe.

    scrubber finds chunk c of block b damaged
        -> chunk c of other blocks: data from their vaults, each checked; parity from theirs
        -> decode (data) or encode (parity), check against the hash that b's chunk always had, write it in place

What is written has the right hash, so a reader who comes in between sees either damage, which it decodes around, or
the right bytes. If nothing with the right hash can be made, the chunk stays erased and the tolerance is one less.

Rule of this file: nothing is written whose hash was not checked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fault_tolerance.coding.codec import Codec, crc32c
from fault_tolerance.coding.placement import Group, Stripe
from fault_tolerance.snapshots.encoder import request
from fault_tolerance.snapshots.peers import Peers
from fault_tolerance.snapshots.version import Bytes, Version
from fault_tolerance.snapshots.wire import Refused, WireError


def repair(version: Version, kind: str, index: int, chunk: int, *, peers: Peers) -> bool:
    """Make a damaged chunk again. Whether that was possible. The caller keeps the version's memory from being freed."""
    group = version.plan.group_of(version.node)
    stripe = _stripe(group, version.node, kind, index)
    size = version.plan.chunk_bytes
    start, target = chunk * size, version.block(kind, index)[chunk * size : (chunk + 1) * size]
    length = min(size, version.plan.block_bytes(version.node) - start)
    for present in _choices(version, group, stripe, start, length, peers):
        made = np.empty(length, np.uint8)
        Codec(group.k, group.m).decode({i: part.data for i, part in present.items()}, {_own(stripe, version): made.data})
        if crc32c(made[: len(target)]) == int(version.hashes(kind, index)[chunk]):
            target[:] = made[: len(target)]
            return True
    return False


def _stripe(group: Group, node: str, kind: str, index: int) -> Stripe:
    if kind == "data":
        return group.stripes[group.stripe_of(node, index)]
    return group.stripes[next(stripe for stripe, number in group.parities_of(node) if number == index)]


def _own(stripe: Stripe, version: Version) -> int:
    return stripe.nodes.index(version.node)


def _choices(
    version: Version, group: Group, stripe: Stripe, start: int, length: int, peers: Peers
) -> Iterator[dict[int, Bytes]]:
    """Sets of k other blocks' chunks. A parity's hash is known to its holder alone, so each parity is tried."""
    own = _own(stripe, version)
    data = {p: part for p in range(group.k) if p != own for part in [_data(version, group, stripe, p, start, length, peers)]}
    good = {position: part for position, part in data.items() if part is not None}
    lacking = group.k - len(good)
    if lacking == 0:
        yield good
        return
    parities: list[tuple[int, Bytes]] = []
    for position in range(group.k, len(stripe.nodes)):
        if position == own:
            continue
        part = _read(version, stripe.nodes[position], "parity", position - group.k, start, length, peers)
        if part is not None:
            parities.append((position, part))
            if len(parities) >= lacking:
                yield good | dict(parities[-lacking:])


def _data(
    version: Version, group: Group, stripe: Stripe, position: int, start: int, length: int, peers: Peers
) -> Bytes | None:
    node, out = stripe.nodes[position], np.zeros(length, np.uint8)
    block = group.block_of(node, stripe.index)
    meta = version.metas.get(node)
    if block is None or meta is None:
        return None
    real = max(0, min(length, version.plan.real_bytes(node, block) - start))
    if real:
        part = _read(version, node, "data", block, start, real, peers)
        if part is None or crc32c(part) != int(meta.hashes[block][start // version.plan.chunk_bytes]):
            return None
        out[:real] = part
    return out


def _read(version: Version, node: str, kind: str, index: int, start: int, length: int, peers: Peers) -> Bytes | None:
    out = np.empty(length, np.uint8)
    wanted = {"kind": kind, "index": index, "offset": start, "length": length, "paced": True}
    try:
        with peers.borrow(node) as channel:
            channel.send(request("read", version) | wanted)
            if channel.reply()[1] != length:
                raise WireError(f"a chunk of {kind} block {index} of {node} must have {length} bytes")
            channel.recv_into(out.data)
    except (WireError, Refused, KeyError):  # KeyError: the address of a node of an earlier plan is not known any more
        return None
    return out
