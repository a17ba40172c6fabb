"""Holding: a rank's state, kept by its own process from the end of a generation to the start of the next.

    a vault is lost, all ranks live -> they end at a step boundary, each with a copy of its state -> the same ranks go on from it

What vaults keep is one step old and needs enough of the vaults; what ranks have is new and needs none of them. It lasts as
long as every one of these processes does, so the first thing that the next generation does is a snapshot.

Rule of this file: a copy and its proof. Who holds, and when, the controller says.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fault_tolerance.snapshots.restore import share
from framework.training.restoring import agree, total
from parallel.atlas import Piece
from parallel.engine import Engine
from parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Held:
    """A copy of what one rank had after `step`, in host memory, and the digest of the whole state, of all ranks together."""

    step: int
    rank: int
    state: dict[Piece, Tensor]
    digest: int


def hold(engine: Engine, mesh: Mesh, step: int) -> Held:
    """Copy a rank's state. All ranks together. Raises RuntimeError when one of them is lost meanwhile."""
    state = engine.state()
    _, digest = total(mesh, share(engine.atlas, mesh.rank, state))
    copies = {piece: tensor.detach().to("cpu", copy=True) for piece, tensor in state.items()}
    return Held(step, mesh.rank, copies, digest)


def take_up(held: Held | None, engine: Engine, mesh: Mesh, step: int) -> dict[str, object]:
    """Fill the engine with what this process holds. Returns the fields of `Recovery` that are known here.

    Raises RestoreFailed on every rank if one holds nothing, something else, or other bytes than it had.
    """
    state, captured, part, failure = engine.state(), 0, 0, ""
    if held is None or (held.step, held.rank) != (step, mesh.rank) or held.state.keys() != state.keys():
        failure = f"this process must hold the state of rank {mesh.rank} after step {step}, and does not"
    else:
        for piece, tensor in state.items():
            tensor.copy_(held.state[piece])
        captured, part = held.digest, share(engine.atlas, mesh.rank, state)
    agree(mesh, captured, part, failure)
    engine.loaded(step)
    return {"tier": "local", "step": step, "bytes_local": sum(tensor.nbytes for tensor in state.values())}
