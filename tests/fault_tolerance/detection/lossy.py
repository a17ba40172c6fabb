"""What machines see of each other over ways that lose what goes one way, for tests of whoever asks or judges that."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import permutations

from fault_tolerance.detection.reachability import Stage, Way

FINE = Way(Stage.DONE, 0.001, "", 8, 8)


def seen(nodes: Iterable[str], lost: Collection[tuple[str, str]]) -> dict[tuple[str, str], Way]:
    """TCP needs both directions of a pair, a datagram only its own."""
    return {
        (a, b): Way(Stage.CONNECT, 2.5, "timed out", 8, 0 if (a, b) in lost else 8) if (a, b) in lost or (b, a) in lost else FINE
        for a, b in permutations(nodes, 2)
    }
