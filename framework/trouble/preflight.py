"""Preflight: the nodes that a run would begin on are examined before they train (`cluster.preflight`).

Rule of this file: it has them examined (`doctor.py`), writes down what was found, and refuses what must not be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from framework.cluster.cluster import Cluster
from framework.config import Config
from framework.control.journal import Journal
from framework.control.pool import Pool, PoolError
from framework.plan import Refused, Unfit
from framework.trouble.doctor import examine, words


def preflight(config: Config, nodes: Sequence[str], *, cluster: Cluster, pool: Pool, journal: Journal) -> None:
    """Examine nodes that are here. Raises Refused where no training should start, Unfit where the config is at fault."""
    began = time.monotonic()
    hosts = {node.name: node.ip for node in cluster.nodes() if node.name in nodes}
    try:
        pool.ensure([f"{node}.0" for node in hosts], timeout_s=config.cluster.start_timeout_s)
    except PoolError as error:
        raise (Unfit(error.misfit) if error.misfit else Refused(f"preflight: {error}")) from error
    agents = {node: pool.agents[node] for node in hosts}
    checkup = examine(agents, hosts, one_machine=cluster.control is not None)
    (Path(config.run_dir) / "preflight.txt").write_text(words(checkup) + "\n")
    found = [finding.reason for finding in checkup.findings]
    reason = "; ".join(found) or f"{len(hosts)} nodes and the ways between them are alike"
    journal.event("preflight", reason=reason, findings=found, nodes=sorted(hosts), preflight_s=time.monotonic() - began)
    if any(finding.must for finding in checkup.findings):
        raise Refused(f"preflight: {reason}; see preflight.txt, or use cluster.preflight=false")
