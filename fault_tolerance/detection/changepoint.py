"""Change points: since when a series has another level, found while it comes in.

    run length r:  P(r+1) ~ P(r) pi(x|r) (1-h)          the level stays
                   P(0)   ~ sum_r P(r) pi(x|r) h        a new level begins

with a Normal-Gamma prior per run, whose predictive is a Student-t. The prior's spread comes from the first samples: a
slow-down of 10% is nothing where the noise is 20%, and plain where it is 2%.

Rule of this file: numbers in, numbers out. Source: Adams and MacKay, Bayesian online changepoint detection (2007).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

HAZARD = 1 / 200
LONGEST = 300
SHAPE = 3.0  # of the prior; a sample adds half


@dataclass(frozen=True, slots=True)
class Change:
    """`level` holds since sample `since`; before, it was `before`."""

    since: int
    before: float
    level: float
    probability: float

    @property
    def ratio(self) -> float:
        """How many times the old level the new one is."""
        return self.level / self.before


class ChangePoints:
    """Feed it a positive series; it answers with the change that the newest samples have made certain, once each.

    `learn` samples set the prior and can raise no alarm; a change counts if it is at least `least` (0.1 = 10%) of the
    level, has `settle` samples, its probability exceeds `sure`, and the levels are `sigmas` standard errors apart, by
    the differences of neighbours: a noise that grew is no new level.
    """

    def __init__(
        self,
        *,
        learn: int = 10,
        least: float = 0.08,
        settle: int = 3,
        sure: float = 0.8,
        sigmas: float = 3.0,
        hazard: float = HAZARD,
    ) -> None:
        self._learn, self._least, self._settle, self._sure, self._hazard = learn, least, settle, sure, hazard
        self._sigmas = sigmas
        self._values: list[float] = []
        self._start = 0  # of the level that is known
        self._runs = np.zeros(0)

    @property
    def level(self) -> float:
        """The median since the last change, 0 before the first sample."""
        return float(np.median(self._values[self._start :])) if self._values[self._start :] else 0.0

    def add(self, value: float) -> Change | None:
        """Take in the next sample. Costs O(run length), about 30 us. Raises ValueError unless it is positive."""
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"changepoint: samples must be positive numbers, got {value}")
        self._values.append(value)
        if len(self._values) < self._learn:
            return None
        if len(self._values) == self._learn:
            self._begin()
            return None
        self._step(math.log(value))
        return self._decide()

    def _begin(self) -> None:
        logs = np.log(self._values)
        middle = float(np.median(logs))
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.005)
        self._prior = (middle, 0.01, SHAPE, SHAPE * spread**2)
        self._runs = np.ones(1)
        self._mu, self._k, self._a, self._b = (np.array([p]) for p in self._prior)
        for x in logs:
            self._step(float(x))

    def _step(self, x: float) -> None:
        scale2 = self._b * (self._k + 1) / (self._a * self._k)
        likely = self._runs * _student(x, 2 * self._a, self._mu, scale2)
        runs = np.concatenate([[likely.sum() * self._hazard], likely * (1 - self._hazard)])
        total = runs.sum()
        runs = runs / total if total > 0 else np.eye(1, len(runs))[0]
        mu = (self._k * self._mu + x) / (self._k + 1)
        b = self._b + self._k * (x - self._mu) ** 2 / (2 * (self._k + 1))
        m0, k0, a0, b0 = self._prior
        self._runs = runs[:LONGEST]
        self._mu = np.concatenate([[m0], mu])[:LONGEST]
        self._k = np.concatenate([[k0], self._k + 1])[:LONGEST]
        self._a = np.concatenate([[a0], self._a + 0.5])[:LONGEST]
        self._b = np.concatenate([[b0], b])[:LONGEST]

    def _decide(self) -> Change | None:
        count = len(self._values)
        since_known = count - self._start
        recent = min(since_known - 1, 4 * self._settle)
        if recent < self._settle or recent >= len(self._runs):
            return None
        probability = float(self._runs[self._settle : recent + 1].sum())
        if probability <= self._sure:
            return None
        length = self._settle + int(np.argmax(self._runs[self._settle : recent + 1]))
        before = float(np.median(self._values[self._start : count - length]))
        level = float(np.median(self._values[count - length :]))
        if abs(level / before - 1) < self._least or not self._stands_out(level / before, length):
            return None
        self._start = count - length
        return Change(self._start, before, level, probability)

    def _stands_out(self, ratio: float, length: int) -> bool:
        logs = np.log(self._values[self._start :][-60:])
        noise = 1.4826 * float(np.median(np.abs(np.diff(logs)))) / math.sqrt(2)
        earlier = max(1, len(self._values) - length - self._start)
        return abs(math.log(ratio)) >= self._sigmas * 1.25 * noise * math.sqrt(1 / length + 1 / earlier)


def _student(x: float, freedom: np.ndarray, mu: np.ndarray, scale2: np.ndarray) -> np.ndarray:
    z2 = (x - mu) ** 2 / scale2
    return np.exp(_heights(len(mu)) - 0.5 * np.log(scale2) - (freedom + 1) / 2 * np.log1p(z2 / freedom))


@cache
def _heights(runs: int) -> np.ndarray:
    """The logarithms of the densities' tops at scale 1, by run length, of which the degrees of freedom are a function."""
    freedom = 2 * SHAPE + np.arange(runs)
    gamma = np.array([math.lgamma((f + 1) / 2) - math.lgamma(f / 2) for f in freedom])
    return np.asarray(gamma - 0.5 * np.log(freedom * math.pi))
