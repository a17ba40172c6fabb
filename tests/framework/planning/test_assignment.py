"""Assignments against all permutations."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from framework.planning.assignment import assign

tables = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 20), min_size=n, max_size=n), min_size=n, max_size=n))


def test_the_drawing() -> None:
    assert assign([[3, 1, 2], [2, 0, 4], [1, 5, 5]]) == [0, 2, 1]


@given(tables)
def test_no_permutation_gains_more(gain: list[list[int]]) -> None:
    found = assign(gain)
    assert sorted(found) == list(range(len(gain)))
    best = max(sum(gain[i][j] for i, j in enumerate(order)) for order in permutations(range(len(gain))))
    assert sum(gain[i][j] for i, j in enumerate(found)) == best
