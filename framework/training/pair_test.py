"""Pair test: what a crew measures of itself when somebody in it is suspected, at a step boundary, all ranks together.

    the same computation on every rank, the same message on every way (of a ring, where there are many ranks)

Rule of this file: it measures; `fault_tolerance/detection/pairtest.py` judges.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fault_tolerance.detection.pairs import measure_compute, measure_ways
from fault_tolerance.detection.pairtest import all_rounds, ring_rounds

ALL_WAYS = 16  # ranks, up to which every way is measured


def pair_test(device: torch.device) -> dict[str, Any]:
    """`compute`: seconds by rank; `ways`: [from, to, seconds]. The same on all ranks, which must call it together."""
    everybody = dist.group.WORLD
    assert everybody is not None, "a crew is connected"
    ranks = range(dist.get_world_size())
    rounds = all_rounds(ranks) if len(ranks) <= ALL_WAYS else ring_rounds(ranks)
    compute = measure_compute(everybody, device=device)
    ways = measure_ways(everybody, rounds, device=device)
    return {
        "compute": [compute[rank] for rank in sorted(compute)],
        "ways": [[a, b, seconds] for (a, b), seconds in sorted(ways.items())],
    }
