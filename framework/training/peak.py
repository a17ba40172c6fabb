"""Peak: what a worker's device computes at most, which model FLOPs utilisation (MFU) is measured against.

    MFU = (FLOPs of the model per token x tokens per second) / (workers x peak of each)

For known GPUs it is the data sheet's dense rate; for others, and for processors, the best of a few large matrix products,
made once at the start. Emulated nodes share one machine, and no more than its cores can be used of it.

Source: PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

import os
import time

import torch

DATA_SHEETS = {  # part of the device's name: dense FLOP/s in bf16, and in fp32 as PyTorch multiplies by default
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
}
SIZE, REPEATS = {"cpu": 512, "cuda": 4096}, 4


def peak_flops(device: str, *, precision: str) -> float:
    """FLOP/s of this process's device at most, in a precision (fp32 or bf16)."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        known = next((rates for part, rates in DATA_SHEETS.items() if part in name), None)
        if known is not None:
            return known[0 if precision == "bf16" else 1]
    return _measured(device, torch.bfloat16 if precision == "bf16" and device == "cuda" else torch.float32)


def shared(peak: float, *, workers_here: int, threads: int, cores: int | None = None) -> float:
    """The part of a processor's peak that each of the workers on one machine can have."""
    return peak * min(1.0, (cores or os.cpu_count() or 1) / (workers_here * threads))


def _measured(device: str, dtype: torch.dtype) -> float:
    size = SIZE[device]
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        product = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        del product
    return 2.0 * size**3 / min(times)
