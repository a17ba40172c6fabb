"""A vault, or a worker's end of one, that kills itself with SIGKILL at one exact point of a snapshot's life.

    python -m tests.fault_tolerance.snapshots.dying POINT STEP --node a --run 7f3c        a vault, otherwise as it is
    die_in(*WORKER_POINTS[POINT], step=2)                                        in a process that stages

The point is a method of the real code; it dies as the method is entered (`call` times, for one that is called often).
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
from typing import Any

from fault_tolerance.snapshots import vault
from fault_tolerance.snapshots.agreement import Agreement
from fault_tolerance.snapshots.encoder import Encoder, _StripeJob
from fault_tolerance.snapshots.vault import Vault
from fault_tolerance.snapshots.vault_requests import Requests
from fault_tolerance.snapshots.version import State, Version
from fault_tolerance.snapshots.wire import Channel

POINTS: dict[str, tuple[type, str, int]] = {
    "before staging: a rank asks where to copy to": (Vault, "begin", 1),
    "during staging: one of two ranks has copied": (Vault, "staged", 2),
    "staged, and nobody was told": (Vault, "add_meta", 1),
    "between staging and encoding: all were told": (Encoder, "_encode", 1),
    "during encoding: the second chunk": (_StripeJob, "_push", 2),
    "during transfer: another vault reads": (Requests, "read", 1),
    "during transfer: a parity chunk comes": (Requests, "push", 2),
    "encoded, and the coordinator was not told": (Vault, "report", 1),
    "as the older step is about to be freed": (Vault, "drop_all", 1),
    "as the older step is freed": (Vault, "drop", 1),
    "protected, and the others were not told": (Agreement, "_tell", 1),
}
WORKER_POINTS: dict[str, tuple[type | str, str, int]] = {  # a name: what imports torch, for which a vault has no time
    "before staging: the vault was not asked": ("fault_tolerance.snapshots.snapshot:Snapshotter", "_segment", 1),
    "during staging: two tensors are copied": ("fault_tolerance.snapshots.snapshot:Snapshotter", "_copy", 3),
    "all is copied, and the vault was not told": (Channel, "call", 2),
    "the vault was told": (Channel, "call", 3),
}
FREEING = ("drop_all", "drop")


def die_in(owner: type | str, method: str, call: int, *, step: int) -> None:
    """From now on this process dies at the `call`-th entry of a method that has to do with `step`."""
    owner = pkgutil.resolve_name(owner) if isinstance(owner, str) else owner
    original, left = getattr(owner, method), [call]

    def dying(self: Any, *args: Any, **options: Any) -> Any:
        if _concerns(self, method, step, args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **options)

    setattr(owner, method, dying)


def _concerns(self: Any, method: str, step: int, args: tuple[Any, ...]) -> bool:
    if method in FREEING:  # of the older step, after the newer one became protected here
        return any(v.step == step and v.state is State.PROTECTED for v in self.versions.values())
    if isinstance(self, Vault) and method == "add_meta":
        return args[0].step == step and args[1].node == self.node
    version = getattr(self, "_version", None)
    if isinstance(version, Version):
        return version.step == step
    return step in [a.get("step") if isinstance(a, dict) else a if isinstance(a, int) else getattr(a, "step", None) for a in args]


if __name__ == "__main__":
    owner, method, call = POINTS[sys.argv[1]]
    die_in(owner, method, call, step=int(sys.argv[2]))
    vault.main(sys.argv[3:])
