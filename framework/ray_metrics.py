"""Ray's metrics: gauges that the agents of a cluster's nodes export to Prometheus.

Rule of this file: one of the few that Ray enters by.
"""

from __future__ import annotations

from ray.util.metrics import Gauge as RayGauge

from framework.telemetry_prometheus import Gauge, by_name


def exported(run_id: str) -> Gauge:
    """Gauges under the label `run`. A local cluster has no agents, so there nobody would see them."""

    def make(name: str) -> RayGauge:
        gauge = RayGauge(name, description="of a holdfast run", tag_keys=("run",))
        gauge.set_default_tags({"run": run_id})
        return gauge

    return by_name(make)
