"""Restoring: a worker's part in taking the state over, from the vaults or from a checkpoint, under any layout.

    wanted = the boxes this rank holds under the new layout
    memory    from whichever vault has each byte, or decoded        proof: hashes of chunks, then the logical digest,
    durable   byte ranges of the checkpoint's files                        summed over all ranks, as it was at capture

Rule of this file: nobody trains on bytes that failed their proof, and all ranks agree on whether they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from fault_tolerance.checkpoints.storage import StorageError
from fault_tolerance.checkpoints.verify import DamageError
from fault_tolerance.digest import MODULUS
from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.restore import Reader, RestoreError, share
from fault_tolerance.snapshots.wire import Refused, WireError
from framework.plan import Source
from parallel.atlas import Atlas, Piece
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh

LIMB_BITS = 16  # a 64-bit digest is summed over ranks in four parts, each exact in float64
PART_BYTES = 1 << 30  # of host memory on the way from a checkpoint to a device
FAILURES = (RestoreError, DamageError, StorageError, WireError, Refused, ValueError, OSError)

ReadTensor = Callable[[str], NDArray[Any]]


class RestoreFailed(RuntimeError):
    """The bytes could not be had, or are not those that were captured."""


def restore(
    engine: Engine, mesh: Mesh, source: Source, *, snapshot: dict[str, Any] | None, node: str, secret: bytes
) -> dict[str, Any]:
    """Fill the engine's state. Returns the fields of `Recovery` that are known here.

    Raises RestoreFailed on every rank if it fails on one.
    """
    captured, part, failure, found = 0, 0, "", dict[str, Any]()
    try:
        if source.tier == "durable":
            found = _from_checkpoint(engine, str(source.path))
        else:
            assert snapshot is not None, "a plan that restores from memory comes with its snapshot"
            kept = Snapshot.from_json(snapshot)
            captured = kept.digest
            found, part = _from_memory(engine, mesh.rank, kept, node=node, secret=secret)
    except FAILURES as error:
        failure = f"{type(error).__name__}: {error}"
    agree(mesh, captured, part, failure)
    engine.loaded(found["step"])
    return found


@contextmanager
def tensor_reader(snapshot: Snapshot, *, node: str, secret: bytes) -> Iterator[ReadTensor]:
    """A function that reads whole logical tensors of a snapshot, one at a time. It raises RestoreError."""
    reader, plan = Reader(snapshot, node=node, secret=secret), snapshot.plan

    def read(name: str) -> NDArray[Any]:
        whole = Atlas((plan.atlas.by_name[name],), Layout(), "1f1b", plan.atlas.num_layers)
        tensor = torch.empty(plan.atlas.by_name[name].shape, dtype=torch.float32)
        reader.restore(whole, 0, {whole.held(0)[0]: tensor})
        values: NDArray[Any] = tensor.numpy()
        return values

    try:
        yield read
    finally:
        reader.close()


def _from_checkpoint(engine: Engine, path: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    try:
        num_bytes = sum(_read(checkpoint, part) for part in _parts(engine.state()))
    finally:
        checkpoint.close()
    return {"tier": "durable", "step": checkpoint.step, "bytes_peer": num_bytes}


def _parts(state: Mapping[Piece, Tensor]) -> Iterator[dict[Piece, Tensor]]:
    """What is on the host all at once, what is on a device in parts that pass through the host's memory."""
    yield {piece: tensor for piece, tensor in state.items() if tensor.is_cpu}
    part, num_bytes = dict[Piece, Tensor](), 0
    for piece, tensor in state.items():
        if not tensor.is_cpu:
            part[piece], num_bytes = tensor, num_bytes + tensor.nbytes
        if num_bytes >= PART_BYTES:
            yield part
            part, num_bytes = {}, 0
    yield part


def _read(checkpoint: Checkpoint, part: Mapping[Piece, Tensor]) -> int:
    """Fill tensors. Returns the bytes that were read for it."""
    if not part:
        return 0
    host = {piece: tensor if tensor.is_cpu else torch.empty(tensor.shape, dtype=tensor.dtype) for piece, tensor in part.items()}
    stats = checkpoint.read_into(host)
    for piece, tensor in part.items():
        if not tensor.is_cpu:
            tensor.copy_(host[piece])
    return stats.bytes_read


def _from_memory(
    engine: Engine, rank: int, snapshot: Snapshot, *, node: str, secret: bytes
) -> tuple[dict[str, Any], int]:
    reader = Reader(snapshot, node=node, secret=secret)
    try:
        stats = reader.restore(engine.atlas, rank, engine.state())
        part = share(engine.atlas, rank, engine.state())
    finally:
        reader.close()
    found = {
        "tier": stats.tier,
        "step": snapshot.step,
        "bytes_local": stats.local_bytes,
        "bytes_peer": stats.peer_bytes,
        "bytes_decoded": stats.decoded_bytes,
    }
    return found, part


def total(mesh: Mesh, part: int, *, failed: bool = False) -> tuple[int, int]:
    """How many ranks have failed, and the digest of the state of which every rank gives its part. A collective."""
    limbs = [float(part >> shift & (1 << LIMB_BITS) - 1) for shift in range(0, 64, LIMB_BITS)]
    failures, *sums = mesh.sum(torch.tensor([float(failed), *limbs], dtype=torch.float64)).tolist()
    whole = sum(int(limb) << shift for limb, shift in zip(sums, range(0, 64, LIMB_BITS), strict=True))
    return int(failures), whole % MODULUS


def agree(mesh: Mesh, captured: int, part: int, failure: str) -> None:
    """All ranks learn whether all have their bytes, and whether these are the bytes that were captured. Raises RestoreFailed."""
    failures, restored = total(mesh, part, failed=bool(failure))
    if failures:
        raise RestoreFailed(failure or f"{failures} other ranks failed")
    if restored != captured:
        raise RestoreFailed(f"digest of the state must be {captured:016x} as at capture, got {restored:016x}")
