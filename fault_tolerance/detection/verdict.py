"""Verdict: what the records say is wrong, with whom, how sure that is, and why.

    records of all ranks  ->  hangs.py  stragglers.py  links.py  mismatches.py  numerics.py  ->  Verdict  ->  actions.py

Rule of this file: values only. The kinds are those of an incident's `kind`, and more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from parallel.layout import Layout


class Kind(StrEnum):
    """What is wrong."""

    CRASH = "crash"  # a process is gone
    NODE_LOSS = "node_loss"  # a whole machine is gone, or cannot be reached
    HANG = "hang"  # a rank never came to an operation the others wait in
    LINK_HANG = "link_hang"  # all came, and a transfer does not end
    SLOW_COMPUTE = "slow_compute"  # a rank needs longer for the same work, and others wait for it
    SLOW_LINK = "slow_link"  # the way between two ranks, or of one node, needs longer for the same bytes
    SLOW_ALL = "slow_all"  # everything is slower; nobody in particular
    WANDERING = "wandering"  # somebody is always slow, never the same one
    MISMATCH = "mismatch"  # ranks call different operations, or the same with different shapes
    NAN = "nan"  # one rank's numbers are not numbers
    OUTLIER = "outlier"  # one rank's numbers are far from everybody else's
    CORRUPT = "corrupt"  # replicas that must be equal are not


NAMES_NOBODY = frozenset({Kind.SLOW_ALL, Kind.WANDERING})


@dataclass(frozen=True, slots=True)
class Verdict:
    """`link` is (from, to) in world ranks. `severity` is how many times longer things take; 0 where nothing moves.

    `evidence` are the measurements, one line each; `reason` is one sentence that a person can act on.
    """

    kind: Kind
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    reason: str
    link: tuple[int, int] | None = None
    evidence: tuple[str, ...] = ()
    confidence: float = 1.0
    severity: float = 1.0

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two verdicts on the same trouble."""
        return self.kind, self.ranks, self.nodes, self.link


@dataclass(frozen=True, slots=True)
class Topology:
    """Where every rank sits: `nodes[rank]` is the name of its machine. Raises ValueError unless there is one a rank."""

    layout: Layout
    nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.nodes) != self.layout.world:
            raise ValueError(f"topology: {self.layout} needs {self.layout.world} nodes, got {len(self.nodes)}")

    @staticmethod
    def one_node_each(layout: Layout) -> Topology:
        """Every rank on a machine of its own."""
        return Topology(layout, tuple(f"node{rank}" for rank in range(layout.world)))

    def on(self, ranks: Iterable[int]) -> tuple[str, ...]:
        """The machines of these ranks, each once, in order."""
        return tuple(dict.fromkeys(self.nodes[rank] for rank in ranks))

    def peers(self, rank: int) -> tuple[int, ...]:
        """Who does the same work: the other ranks of its pipeline stage (other replicas, and tensor-parallel peers)."""
        stage = self.layout.seat(rank)[0]
        width = self.layout.dp * self.layout.tp
        return tuple(other for other in range(stage * width, (stage + 1) * width) if other != rank)

    def ranks_of(self, node: str) -> tuple[int, ...]:
        """The ranks on a machine."""
        return tuple(rank for rank, name in enumerate(self.nodes) if name == node)
