"""Rows, columns and transposes of tiles: of buffers against numpy's slices, of HBM against the tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import Hazard
from flashsim.machine.buffers import Buffer, View
from flashsim.machine.tiles import HbmTile

SHAPE = (12, 20)
Steps = list[tuple[str, int, int]]


def filled() -> tuple[Buffer, NDArray[np.float64]]:
    buffer = Buffer("K", SHAPE, "fp16", "shared", functional=True)
    numbers = np.arange(SHAPE[0] * SHAPE[1], dtype=np.float64).reshape(SHAPE)
    buffer.whole.assign(numbers)
    return buffer, numbers


@st.composite
def steps(draw: st.DrawFn) -> Steps:
    """Some narrowings and transposes; fractions stand for where to cut, since the shape is not known here."""
    kinds = st.sampled_from(["rows", "columns", "T"])
    return [(draw(kinds), draw(st.integers(0, 99)), draw(st.integers(0, 99))) for _ in range(draw(st.integers(0, 6)))]


def follow(view: View, array: NDArray[np.float64], steps: Steps) -> tuple[View, NDArray[np.float64]]:
    for kind, at, width in steps:
        if kind == "T":
            view, array = view.T, array.T
            continue
        length = array.shape[kind == "columns"]
        start = at * length // 100
        count = 1 + width * (length - start) // 100
        count = min(count, length - start)
        view = getattr(view, kind)(start, count)
        array = array[start : start + count] if kind == "rows" else array[:, start : start + count]
    return view, array


@given(steps())
def test_a_view_of_a_buffer_is_numpys_slice(steps: Steps) -> None:
    buffer, numbers = filled()
    view, expected = follow(buffer.whole, numbers, steps)
    assert view.shape == expected.shape
    assert view.size_byte == 2 * expected.size
    assert np.array_equal(view.numbers(), expected)


@given(steps())
def test_what_is_assigned_to_a_view_lies_there_and_nowhere_else(steps: Steps) -> None:
    buffer, numbers = filled()
    view, target = follow(buffer.whole, numbers, steps)
    new = -np.arange(1, target.size + 1, dtype=np.float64).reshape(target.shape)
    target[...] = new
    view.assign(new)
    assert np.array_equal(buffer.array, numbers)


@given(steps())
def test_the_part_of_a_view_is_what_it_touches(steps: Steps) -> None:
    """Rows and columns of the buffer, however it is turned: what races are looked for in."""
    buffer, numbers = filled()
    view, expected = follow(buffer.whole, numbers, steps)
    rows, columns = (slice(*span) for span in view.part)
    assert np.array_equal(np.sort(numbers[rows, columns], axis=None), np.sort(expected, axis=None))
    assert view.is_whole == (expected.size == numbers.size)


def test_the_whole_is_one_object_and_so_is_its_transpose() -> None:
    """Views that stand for the same are the same, so that costs are looked up once."""
    buffer, _ = filled()
    assert buffer.whole.T.T is buffer.whole
    assert buffer.whole.rows(0, 12).columns(0, 20) is buffer.whole
    assert buffer.whole.T.rows(0, 20) is buffer.whole.T


@pytest.mark.parametrize(
    ("what", "start", "count", "message"),
    [
        ("rows", 10, 3, "rows 10 to 12 of a tile that has rows 0 to 11"),
        ("rows", -1, 2, "rows -1 to 0 of a tile that has rows 0 to 11"),
        ("columns", 0, 21, "columns 0 to 20 of a tile that has columns 0 to 19"),
        ("columns", 4, 0, "columns 4 to 3 of a tile that has columns 0 to 19"),
    ],
)
def test_what_lies_outside_is_refused(what: str, start: int, count: int, message: str) -> None:
    buffer, _ = filled()
    tile = HbmTile("K", 0, 0, (0, 0), SHAPE, SHAPE, "fp16")
    for view in (buffer.whole, tile):
        with pytest.raises(IndexError, match=message):
            getattr(view, what)(start, count)


def test_the_limits_of_a_transpose_are_those_of_the_other_axis() -> None:
    buffer, _ = filled()
    assert buffer.whole.T.rows(12, 8).shape == (8, 12)
    with pytest.raises(IndexError, match="columns 12 to 19 of a tile that has columns 0 to 11"):
        buffer.whole.T.columns(12, 8)
    with pytest.raises(IndexError, match="rows 2 to 4 of a tile that has rows 0 to 3"):
        buffer.whole.rows(4, 4).rows(2, 3)


def test_only_what_is_read_has_to_be_there() -> None:
    buffer = Buffer("dS", SHAPE, "fp16", "shared", functional=True)
    half = buffer.whole.columns(0, 10)
    half.assign(np.ones((12, 10)))
    assert half.T.rows(3, 2).numbers().shape == (2, 12)
    with pytest.raises(Hazard, match=r"dS columns 9 to 10 is read, but part of what"):
        buffer.whole.columns(9, 2).numbers()
    with pytest.raises(Hazard, match=r"dS rows 2 to 3 and columns 10 to 19 is read"):
        buffer.whole.columns(10, 10).rows(2, 2).numbers()


def test_a_tile_over_another_destroys_it() -> None:
    S, _ = filled()
    P = Buffer("P", (4, 4), "fp16", "shared", functional=True)
    P.overlay(S)
    P.whole.rows(0, 2).assign(np.zeros((2, 4)))
    with pytest.raises(Hazard, match="K is read, but P was written over it"):
        S.whole.numbers()


# Tiles in HBM.

END = (30, 50)


def tile(origin: tuple[int, int] = (24, 40)) -> HbmTile:
    """Six of its rows and ten of its columns exist, unless it lies elsewhere."""
    return HbmTile("S", 1, 2, origin, SHAPE, END, "fp32")


def scores() -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((2, END[0], 3, END[1]))


@pytest.mark.parametrize("origin", [(24, 40), (0, 0), (12, 20), (36, 60)])
@pytest.mark.parametrize("cut", [None, ("rows", 2, 5), ("rows", 6, 6), ("columns", 4, 12), ("columns", 0, 1)])
def test_hbm_is_read_with_zeros_past_its_end(origin: tuple[int, int], cut: tuple[str, int, int] | None) -> None:
    tensors = {"S": scores()}
    part = tile(origin) if cut is None else getattr(tile(origin), cut[0])(*cut[1:])
    padded = np.zeros((60, 100))
    padded[: END[0], : END[1]] = tensors["S"][1, :, 2]
    row, column = part.origin
    expected = padded[row : row + part.shape[0], column : column + part.shape[1]]
    assert np.array_equal(part.read(tensors), expected)
    exist = padded[row : row + part.shape[0], column : column + part.shape[1]] != 0
    assert part.size_byte == 4 * exist.sum()


def test_what_is_written_past_the_end_is_dropped() -> None:
    tensors = {"S": scores()}
    before = tensors["S"].copy()
    part = tile().columns(5, 15).rows(1, 11)
    part.write(tensors, np.full(part.shape, 7.0))
    changed = tensors["S"] != before
    assert changed.sum() == 5 * 5
    assert changed[1, 25:30, 2, 45:50].all()


def test_parts_of_parts() -> None:
    part = tile((0, 0)).rows(2, 8).columns(5, 10).rows(3, 2).columns(1, 4)
    assert (part.origin, part.shape, part.part) == ((5, 6), (2, 4), ((5, 7), (6, 10)))
    assert str(part) == "S(batch 1, head 2, rows 5 to 6, columns 6 to 9)"
    assert str(tile((0, 0)).rows(2, 2)) == "S(batch 1, head 2, rows 2 to 3, columns 0 to 19)"
    assert tile((0, 0)).rows(0, 12).key == tile((0, 0)).key
    assert part.key == ("S", 1, 2, 5, 6, 0)
    assert tile().full_byte == 12 * 20 * 4


def test_a_column_of_one_number_a_row() -> None:
    """LSE has three axes."""
    lse = HbmTile("LSE", 1, 2, (24, 0), (12, 1), (30, 1), "fp32")
    tensors = {"LSE": np.random.default_rng(1).standard_normal((2, 30, 3))}
    assert np.array_equal(lse.read(tensors)[:6, 0], tensors["LSE"][1, 24:, 2])
    lse.rows(0, 3).write(tensors, np.zeros((3, 1)))
    assert not tensors["LSE"][1, 24:27, 2].any()
    assert tensors["LSE"][1, 27:, 2].all()
