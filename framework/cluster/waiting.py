"""Waiting: until the cluster has the nodes that a run needs, saying what is missing while it waits.

Rule of this file: it asks the cluster again and again; how many nodes are needed, and for how long, it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from framework.cluster.nodes import ClusterError

SLICE_S = 2.0


class Requires(Protocol):
    """A cluster that can be asked for nodes."""

    def require(self, *, num_nodes: int, timeout_s: float) -> object:
        """Returns when there are so many. Raises ClusterError that says what is needed, present and missing."""


def await_nodes(
    cluster: Requires, *, num_nodes: int, timeout_s: float, stopped: Callable[[], bool], tell: Callable[[str], None]
) -> bool:
    """Wait for nodes. False if `stopped` meanwhile. `tell` hears what is missing whenever that changes.

    Raises ClusterError when the time is over.
    """
    deadline, told = time.monotonic() + timeout_s, ""
    while not stopped():
        left = deadline - time.monotonic()
        try:
            cluster.require(num_nodes=num_nodes, timeout_s=max(0.0, min(SLICE_S, left)))
            return True
        except ClusterError as error:
            if left <= SLICE_S:
                raise ClusterError(str(error).replace(f"after {min(SLICE_S, left):g} s", f"after {timeout_s:g} s")) from error
            missing = str(error).replace(f" after {SLICE_S:g} s", "")
            if missing != told:
                told = missing
                tell(f"waiting up to {left:.0f} s more: {missing}")
    return False
