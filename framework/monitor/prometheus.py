"""Prometheus: gauges of the run for whoever scrapes them.

    cluster with metrics agents   ->  `cluster/ray_metrics.py`: the node's own agent has them, beside Ray's numbers
    local cluster, which has none ->  `endpoint`: the controller serves them; its address stands in <run_dir>/prometheus_url

Rule of this file: gauges by name. What they mean is the sink's matter (`sinks.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Gauge = Callable[[str, float], None]  # sets the gauge of a name


class Settable(Protocol):
    """A gauge of whatever library."""

    def set(self, value: float, /) -> object: ...


def by_name(make: Callable[[str], Settable]) -> Gauge:
    """Gauges that are made when they are first set."""
    made: dict[str, Settable] = {}

    def set_gauge(name: str, value: float) -> None:
        if name not in made:
            made[name] = make(name)
        made[name].set(value)

    return set_gauge


def endpoint(directory: str | Path, host: str) -> Gauge:
    """Serve gauges at a free port of this process, and leave the address in the run directory. Raises OSError."""
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client import Gauge as OwnGauge

    registry = CollectorRegistry()
    server, _ = start_http_server(0, addr=host, registry=registry)
    (Path(directory) / "prometheus_url").write_text(f"http://{host}:{server.server_port}/metrics\n")
    return by_name(lambda name: OwnGauge(name, "of a holdfast run", registry=registry))
