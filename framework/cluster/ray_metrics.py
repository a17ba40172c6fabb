"""Ray's metrics: gauges that the agents of a cluster's nodes export to Prometheus.

Rule of this file: one of the few that Ray enters by.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Gauge


def gauges(run_id: str) -> Callable[[str], Gauge]:
    """Makes gauges under the label `run`. A local cluster has no agents, so there nobody would see them."""

    def make(name: str) -> Gauge:
        gauge = Gauge(name, description="of a holdfast run", tag_keys=("run",))
        gauge.set_default_tags({"run": run_id})
        return gauge

    return make
