"""Log cause: the line that is likely the cause, out of what all ranks wrote before an incident.

    cause:   new (not seen in healthy times), few ranks have it, it came early
    effect:  new, everybody has it, it came late               "connection closed by peer"

    score = novelty * (1 - share of ranks) + earliness

Rule of this file: pure. Times of different ranks are compared only for their order, so clocks may differ a little; give
steps instead of seconds where they differ much. Source: our own rule on Drain's templates.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fault_tolerance.detection.drain import Template, Tree, join_tracebacks

EARLINESS = 0.5


@dataclass(frozen=True, slots=True)
class Line:
    """What a rank wrote, and when."""

    rank: int
    time_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Cause:
    """A suspected line: its first appearance, its template, its score and the ranks that wrote it."""

    line: Line
    template: str
    score: float
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        more = f" (and ranks {list(self.ranks[1:])})" if len(self.ranks) > 1 else ""
        return f"rank {self.line.rank}: {self.line.text.strip()[:300]}{more}"


def messages(rank: int, lines: Iterable[tuple[float, str]]) -> list[Line]:
    """The (time, line) pairs of one rank's output, tracebacks joined."""
    return [Line(rank, time_s, text) for time_s, text in join_tracebacks(lines)]


class Background:
    """How often each template is written in healthy times, per second of one rank."""

    def __init__(self, tree: Tree | None = None) -> None:
        self.tree = tree or Tree()
        self._counts: Counter[int] = Counter()
        self._rank_seconds = 0.0

    def learn(self, lines: Iterable[Line], *, rank_seconds: float) -> None:
        """Take in what healthy ranks wrote in that many rank-seconds."""
        self._counts.update(self.tree.add(line.text).id for line in lines)
        self._rank_seconds += rank_seconds

    def expected(self, template: Template, rank_seconds: float) -> float:
        """How many lines of this kind a healthy time of that length has."""
        return self._counts[template.id] * rank_seconds / self._rank_seconds if self._rank_seconds else 0.0


def likely_causes(
    lines: Iterable[Line], background: Background, *, num_ranks: int, window_s: float, most: int = 3
) -> list[Cause]:
    """The lines before an incident that are new, concentrated and early, best first."""
    ordered = sorted(lines, key=lambda line: line.time_s)
    found: dict[int, list[Line]] = defaultdict(list)
    templates: dict[int, Template] = {}
    for line in ordered:
        template = background.tree.add(line.text)
        templates[template.id] = template
        found[template.id].append(line)
    order = {key: at for at, key in enumerate(sorted(found, key=lambda k: found[k][0].time_s))}
    scores = {key: _score(templates[key], found, order, background, num_ranks, window_s) for key in found}
    best = sorted((k for k in found if scores[k] > 0), key=lambda k: -scores[k])[:most]
    return [_cause(key, found[key], templates[key], scores[key]) for key in best]


def _score(
    template: Template,
    found: Mapping[int, list[Line]],
    order: Mapping[int, int],
    background: Background,
    num_ranks: int,
    window_s: float,
) -> float:
    lines = found[template.id]
    share = len({line.rank for line in lines}) / num_ranks
    expected = background.expected(template, num_ranks * window_s)
    if len(lines) <= expected + 4 * math.sqrt(expected):  # as often as in healthy times, chance included
        return 0.0
    novelty = math.log((len(lines) + 1) / (expected + 1))
    return min(novelty, 1.0) * (1 - share) + EARLINESS * (1 - order[template.id] / len(found))


def _cause(key: int, lines: list[Line], template: Template, score: float) -> Cause:
    return Cause(lines[0], template.text, score, tuple(dict.fromkeys(line.rank for line in lines)))
