"""Boxes against brute force: the same questions asked of an array of indices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.boxes import Box, boxes_of_range, chunk, even

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = draw(SHAPES)
    return shape, draw(boxes(shape)), draw(boxes(shape))


def cells(shape: tuple[int, ...], box: Box) -> set[int]:
    """The flat indices of a box, by looking."""
    index = np.arange(math.prod(shape)).reshape(shape)
    return set(index[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].ravel().tolist())


@given(two_boxes())
def test_the_intersection_has_the_cells_that_both_have(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, one, other = case
    both = one.intersect(other)
    assert (set() if both is None else cells(shape, both)) == cells(shape, one) & cells(shape, other)
    assert both is None or both.size


@given(two_boxes())
def test_runs_are_the_cells_in_order_and_as_long_as_can_be(case: tuple[tuple[int, ...], Box, Box]) -> None:
    _, box, outer = case
    inner = box.intersect(outer)
    if inner is None:
        return
    index = np.arange(outer.size).reshape(outer.shape)
    expected = index[inner.within(outer)].ravel().tolist()
    runs = list(inner.runs(outer))
    assert [i for offset, length in runs for i in range(offset, offset + length)] == expected
    assert len(runs) == 1 or all(length == runs[0][1] for _, length in runs)


@given(SHAPES, st.data())
def test_an_empty_box_has_no_runs(shape: tuple[int, ...], data: st.DataObject) -> None:
    box = data.draw(boxes(shape))
    if not box.size:
        assert list(box.runs(Box.whole(shape))) == []


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunk_cuts_as_torch_does(size: int, parts: int) -> None:
    pieces = list(torch.arange(size).chunk(parts)) if size else []
    expected = [(int(p[0]), int(p[-1]) + 1) for p in pieces if len(p)]
    assert [c for c in (chunk(size, parts, i) for i in range(parts)) if c[0] < c[1]] == expected
    assert all(chunk(size, parts, i)[1] == chunk(size, parts, i + 1)[0] for i in range(parts - 1))


@given(st.integers(0, 40), st.integers(1, 9))
def test_even_parts_tile_and_differ_by_one_at_most(size: int, parts: int) -> None:
    cuts = [even(size, parts, i) for i in range(parts)]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == size
    assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
    assert max(b - a for a, b in cuts) - min(b - a for a, b in cuts) <= 1


@given(SHAPES, st.data())
def test_a_flat_range_is_a_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, total)), data.draw(st.integers(0, total))))
    found = boxes_of_range(shape, start, stop)
    flat = [i for box in found for offset, n in box.runs(Box.whole(shape)) for i in range(offset, offset + n)]
    assert flat == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.data())
def test_a_cut_is_relative_to_the_box(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    box = data.draw(boxes(shape))
    dim = data.draw(st.integers(0, len(shape) - 1))
    start, stop = sorted((data.draw(st.integers(0, box.shape[dim])), data.draw(st.integers(0, box.shape[dim]))))
    index = np.arange(math.prod(shape)).reshape(shape)[box.within(Box.whole(shape))]
    assert set(index.take(range(start, stop), axis=dim).ravel().tolist()) == cells(shape, box.cut(dim, start, stop))


def test_a_scalar_is_one_cell() -> None:
    scalar = Box.whole(())
    assert scalar.size == 1
    assert list(scalar.runs(scalar)) == [(0, 1)]
    assert scalar.intersect(scalar) == scalar


def test_boxes_of_different_dimensions_do_not_meet() -> None:
    with pytest.raises(ValueError, match="equal dimensions"):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))


def test_a_box_that_sticks_out_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie inside"):
        Box((0,), (3,)).within(Box((1,), (4,)))


def test_a_range_outside_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie inside 6 elements"):
        boxes_of_range((2, 3), 0, 7)
