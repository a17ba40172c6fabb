"""Background: threads that work on snapshots give way to training where both want the same core.

    a vault's threads     normal     answer a worker that waits for its memory, a controller, a restore
                          low        encode, send and receive for a snapshot, scrub

Linux has a priority for each thread. A low one gets about a third of a core on which training never rests, and all of
one that is idle. Not less: a step counts as kept only when its snapshot is protected, and that must not wait for ever.
It does not matter that a low thread may hold the interpreter or the vault's lock for a moment: a worker asks for memory a
whole step before it waits.

Rule of this file: a thread lowers itself, once, and stays so: raising it again is a privilege that a vault does not have.
"""

from __future__ import annotations

import contextlib
import os
import threading

STEPS = 4  # of nice, a fifth each
LOWEST = 19


def give_way() -> None:
    """Lower the calling thread below its process, where the system lets it."""
    me = threading.get_native_id()
    low = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + STEPS, LOWEST)
    with contextlib.suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, me) < low:
            os.setpriority(os.PRIO_PROCESS, me, low)
