"""DeviceCopy: from a GPU into host memory in the background.

    memory that could be pinned     side stream  | piece | piece | piece | ...     the device's copy engine writes to its place
    any other memory                side stream  | to A  | to B  | to A  | ...     through two pinned buffers; a thread
                                    thread               | A ->  | B ->  | ...     meanwhile carries the other one's to its place

The side stream begins after the caller's work so far. Pinned memory is several times as fast, for the host copies nothing; it
costs a second or so per ten gigabytes, once.

Rule of this file: the caller's stream is never waited for by the host, nor held up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(slots=True)
class _Flight:
    event: Any
    source: torch.Tensor | None  # the buffer it is in, None where it went straight to its place
    target: NDArray[Any]


class DeviceCopy:
    """`begin` in the thread that computes, then `copy` and `finish` in the thread that copies; `close` before memory that was
    pinned is given back.
    """

    def __init__(self, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._buffers: list[torch.Tensor] = []
        self._streams: dict[torch.device, Any] = {}
        self._flights: list[_Flight] = []
        self._turn = 0
        self._tried: dict[int, int] = {}  # end of each range that should be pinned, by its beginning
        self._pinned: dict[int, int] = {}  # and of those that are

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        """Later copies of these tensors see them as they are after the work that is queued now."""
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def pin(self, memory: NDArray[np.uint8]) -> bool:
        """Have copies into this memory go straight there, if the driver lets it be pinned. Tried once for each range."""
        start = _address(memory)
        if start not in self._tried and memory.nbytes:
            self._tried[start] = start + memory.nbytes
            if self._on_device(lambda: int(torch.cuda.cudart().cudaHostRegister(start, memory.nbytes, PORTABLE)) == 0):
                self._pinned[start] = start + memory.nbytes
        return start in self._pinned

    def copy(self, source: torch.Tensor, target: NDArray[Any]) -> None:
        """Start copying; `target` is filled when `finish` returns, or earlier."""
        stream = self._streams[source.device]
        if any(start <= _address(target) and _address(target) + target.nbytes <= end for start, end in self._pinned.items()):
            self._launch(stream, source, torch.from_numpy(target.view(f"i{target.itemsize}")).view(source.dtype), None, target)
            return
        if sum(flight.source is not None for flight in self._flights) == 2:
            self._land()
        with torch.cuda.device(source.device):
            buffer = self._buffer(source.numel() * source.element_size())
        pinned = buffer.view(source.dtype).view(source.shape)
        self._launch(stream, source, pinned, pinned, target)

    def finish(self) -> None:
        """Wait until everything has arrived; the device's memory may be written again."""
        while self._flights:
            self._land()

    def close(self) -> None:
        """Let go of all memory that was pinned."""
        self.finish()
        for start in self._pinned:
            self._on_device(lambda start=start: int(torch.cuda.cudart().cudaHostUnregister(start)) == 0)
        self._pinned, self._tried = {}, {}

    def _launch(self, stream: Any, source: torch.Tensor, into: torch.Tensor, buffer: torch.Tensor | None, target: NDArray[Any]) -> None:
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
            self._flights.append(_Flight(stream.record_event(), buffer, target))

    def _on_device(self, do: Any) -> bool:
        """Whether a call of the driver's went well; in a thread of its own, for an error would come back in this one's next call."""
        said: list[bool] = []
        device = next(iter(self._streams))

        def call() -> None:
            with torch.cuda.device(device):
                said.append(do())

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join()
        return bool(said and said[0])

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """One of the two, which has landed. Pieces larger than the buffers make them grow once."""
        if not self._buffers or self._buffers[0].numel() < nbytes:
            self.finish()
            size = max(nbytes, self._buffer_bytes)
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._turn = 1 - self._turn
        return self._buffers[self._turn][:nbytes]

    def _land(self) -> None:
        flight = self._flights.pop(0)
        flight.event.synchronize()
        if flight.source is not None:
            np.copyto(flight.target, flight.source.view(-1).view(torch.uint8).numpy().view(flight.target.dtype).reshape(flight.target.shape))


def _address(memory: NDArray[Any]) -> int:
    return int(memory.__array_interface__["data"][0])
