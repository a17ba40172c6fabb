"""DeviceCopy: from a GPU into host memory in the background, through two pinned buffers.

    side stream   | to A | to B | to A | ...        the device's copy engine, after the caller's work so far
    thread               | A -> | B -> | ...        meanwhile the other buffer goes on to its place

Rule of this file: the caller's stream is never waited for by the host, nor held up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(slots=True)
class _Flight:
    event: Any
    source: torch.Tensor
    target: NDArray[Any]


class DeviceCopy:
    """`begin` in the thread that computes, then `copy` and `finish` in the thread that copies."""

    def __init__(self, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._pinned: list[torch.Tensor] = []
        self._streams: dict[torch.device, Any] = {}
        self._flights: list[_Flight] = []
        self._turn = 0

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        """Later copies of these tensors see them as they are after the work that is queued now."""
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def copy(self, source: torch.Tensor, target: NDArray[Any]) -> None:
        """Start copying; `target` is filled when `finish` returns, or earlier."""
        if len(self._flights) == 2:
            self._land()
        buffer = self._buffer(source.numel() * source.element_size())
        pinned, stream = buffer.view(source.dtype).view(source.shape), self._streams[source.device]
        with torch.cuda.stream(stream):
            pinned.copy_(source, non_blocking=True)
            self._flights.append(_Flight(stream.record_event(), pinned, target))

    def finish(self) -> None:
        """Wait until everything has arrived; the device's memory may be written again."""
        while self._flights:
            self._land()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """One of the two, which has landed. Pieces larger than the buffers make them grow once."""
        if not self._pinned or self._pinned[0].numel() < nbytes:
            self.finish()
            size = max(nbytes, self._buffer_bytes)
            self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._turn = 1 - self._turn
        return self._pinned[self._turn][:nbytes]

    def _land(self) -> None:
        flight = self._flights.pop(0)
        flight.event.synchronize()
        np.copyto(flight.target, flight.source.numpy().view(flight.target.dtype))
