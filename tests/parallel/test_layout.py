"""Layouts: text there and back, ranks there and back, against the drawing in the file's header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout

LAYOUTS = st.builds(Layout, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(LAYOUTS)
def test_text_there_and_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@given(LAYOUTS)
def test_every_rank_has_a_seat_of_its_own(layout: Layout) -> None:
    seats = [layout.seat(rank) for rank in range(layout.world)]
    assert sorted(seats) == seats
    assert len(set(seats)) == layout.world
    assert [layout.rank(*seat) for seat in seats] == list(range(layout.world))


def test_the_drawing() -> None:
    layout = Layout(2, 2, 2)
    assert [r for r in range(8) if layout.seat(r)[0] == 1] == [4, 5, 6, 7]
    assert [r for r in range(8) if layout.seat(r)[:2] == (0, 1)] == [2, 3]


@pytest.mark.parametrize("text", ["", "2x2", "2x2x2x2", "ax1x1", "-1x1x1", "2 x 2 x 1"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must read like 2x2x1"):
        Layout.parse(text)


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout\.dp: must be at least 1, got 0"):
        Layout(1, 0, 1)


def test_there_is_no_rank_beyond_the_world() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, 4\), got 4"):
        Layout(2, 2, 1).seat(4)
