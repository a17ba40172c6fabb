"""Notice: SIGTERM, as a request to leave and not as an end.

    cloud, Slurm, Kubernetes, a person  --SIGTERM-->  this process  --poll-->  controller: protect the state, go on without it

The process works on until it is told to end, so that nothing is lost; whoever sent the signal sends SIGKILL when the time is
over. The handler only sets a flag: it may interrupt anything.

Rule of this file: one signal of one process. It decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable


class Notice:
    """Whether this process has been asked to leave since this was made. Made in the main thread, it listens; elsewhere
    it never comes.
    """

    def __init__(self) -> None:
        self._came = False
        self._heard, self._told = os.pipe2(os.O_CLOEXEC)  # of all that wakes a thread, writing to it may interrupt anything
        os.set_blocking(self._told, False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
        else:
            print("notice: not made in the main thread; SIGTERM will end this process at once", flush=True)

    @property
    def came(self) -> bool:
        """Whether SIGTERM has come."""
        return self._came

    def then(self, do: Callable[[], None]) -> None:
        """Do something once it has come, in a thread of its own."""
        threading.Thread(target=self._wait, args=(do,), daemon=True, name="notice").start()

    def _note(self, *_: object) -> None:
        self._came = True
        with contextlib.suppress(BlockingIOError):  # it is full of earlier ones
            os.write(self._told, b"!")

    def _wait(self, do: Callable[[], None]) -> None:
        os.read(self._heard, 1)
        do()
