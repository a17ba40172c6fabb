"""holdfast doctor: examine every node of a cluster and the ways between them, and name the odd one out.

    holdfast doctor cluster.num_nodes=4                                emulated nodes on this machine
    holdfast doctor cluster=attached cluster.address=auto              the nodes of a cluster that runs

Versions, code, interface and why it is the one, processors, memory, shared memory, speed of memory and of matrix products,
clocks, and latency and bandwidth of every pair of nodes in both directions. `cluster.preflight=true` does the same before a
run. Exit code 0 if nothing is wrong, 1 if no training should start with what was found.

Rule of this file: it opens the cluster and prints; who measures is `framework/trouble/doctor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.compose import run_composed
from launch.train import config_of, help_text


def main(arguments: Sequence[str]) -> int:
    """Examine. Returns 0 or 1; raises ValueError for a cluster that cannot be started or joined."""
    if "-h" in arguments or "--help" in arguments:
        print((__doc__ or "") + help_text())
        return 0
    return run_composed("doctor", arguments, _job)


def _job(values: dict[str, Any]) -> int:
    layout = {**values["layout"], "auto": True, "pp": 1, "dp": 1, "tp": 1}  # whatever the nodes are, a layout fits them
    config = config_of({**values, "layout": layout})
    from framework.driver import doctor

    healthy, text = doctor(config)
    print(text)
    return 0 if healthy else 1
