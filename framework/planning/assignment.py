"""Assignment: who takes what, each one thing, for the greatest sum of gains.

           thing 0  1  2
    who 0     [ 3]  1  2        (0, 2, 1): 3 + 4 + 5 = 12
    who 1       2   0 [4]
    who 2       1  [5] 5

Rule of this file: pure, exact, cubic. Source: Kuhn (1955), Munkres (1957); the form with potentials and shortest augmenting
paths is Jonker and Volgenant's (1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def assign(gain: Sequence[Sequence[float]]) -> list[int]:
    """For each row of a square table the column it takes, so that the sum of the gains is the greatest."""
    count = len(gain)
    taken = [-1] * count  # by column: the row that has it
    row_price, column_price = [0.0] * count, [0.0] * count
    for row in range(count):
        _augment(row, gain, taken, row_price, column_price)
    columns = [0] * count
    for column, row in enumerate(taken):
        columns[row] = column
    return columns


def _augment(
    start: int, gain: Sequence[Sequence[float]], taken: list[int], row_price: list[float], column_price: list[float]
) -> None:
    """Give one more row a column, moving others along the path that costs least."""
    count = len(gain)
    distance, before, done = [math.inf] * count, [-1] * count, [False] * count
    row, column, reached = start, -1, 0.0
    while True:
        for other in range(count):
            if not done[other]:
                cost = reached - gain[row][other] - row_price[row] - column_price[other]
                if cost < distance[other]:
                    distance[other], before[other] = cost, column
        column = min((c for c in range(count) if not done[c]), key=lambda c: distance[c])
        reached, done[column] = distance[column], True
        if taken[column] < 0:
            break
        row = taken[column]
    row_price[start] += reached
    for other in range(count):
        if done[other] and other != column:
            column_price[other] += distance[other] - reached
            row_price[taken[other]] += reached - distance[other]
    while column >= 0:
        previous = before[column]
        taken[column] = start if previous < 0 else taken[previous]
        column = previous
