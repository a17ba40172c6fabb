"""Rates: what the machines do, as the few numbers that the cost model needs.

    guess(device)  -->  Rates  --a measured step-->  calibrated  -->  Rates that predict seconds

Before the first step the guesses only have to put layouts in the right order; afterwards every measured step time
makes the predictions those of this cluster.

Rule of this file: numbers; it asks no device anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machines do, per worker unless said otherwise. `pace` multiplies every predicted time.

    `inter_*` is the network of a whole node, which its workers share. `unit_s`: host time for one unit and microbatch.
    `overlap`: the share of dp and pp traffic that hides behind compute. `scatter`: cost of a reduce-scatter in units
    of its ring (gloo's is an all-reduce inside: 2).
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    workers_per_node: int
    intra_bytes_per_s: float
    intra_latency_s: float
    inter_bytes_per_s: float
    inter_latency_s: float
    unit_s: float
    base_bytes: float
    overlap: float = 0.0
    scatter: float = 1.0
    pace: float = 1.0


def guess(
    device: str, *, workers_per_node: int, precision: str = "fp32", cores_per_worker: float = 1.0, memory_bytes: float
) -> Rates:
    """Rates to start from: a core of a current server, or an H100-class GPU with NVLink and one 400 Gbit/s NIC each."""
    if device == "cpu":
        return Rates(
            flops_per_s=4e10 * cores_per_worker,
            memory_bytes=memory_bytes,
            memory_bytes_per_s=4e9 * max(0.5, cores_per_worker),
            workers_per_node=workers_per_node,
            intra_bytes_per_s=1.5e9,
            intra_latency_s=1e-4,
            inter_bytes_per_s=1.2e9,
            inter_latency_s=2e-4,
            unit_s=1e-3 / min(1.0, cores_per_worker),
            base_bytes=0.3 * GIB,
            scatter=2.0,
        )
    return Rates(
        flops_per_s=4e14 if precision == "bf16" else 3e13,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=2e12,
        workers_per_node=workers_per_node,
        intra_bytes_per_s=3e11,
        intra_latency_s=1e-5,
        inter_bytes_per_s=4e10 * workers_per_node,
        inter_latency_s=2e-5,
        unit_s=4e-4,
        base_bytes=2.0 * GIB,
        overlap=0.7,
    )


def calibrated(rates: Rates, *, predicted_s: float, measured_s: float) -> Rates:
    """The same machines, after a step that was predicted to take `predicted_s` took `measured_s`."""
    if min(predicted_s, measured_s) <= 0:
        raise ValueError(f"cost: step times must be above 0, got predicted {predicted_s} and measured {measured_s}")
    return replace(rates, pace=rates.pace * measured_s / predicted_s)
