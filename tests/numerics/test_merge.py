"""The merge of two partial softmaxes: its algebra, and the safe softmax of all keys at once, by math.exp and math.fsum.

A weight that went through d merges is a product of at most d + 1 exponentials. With u = 2**-53 and 4 units in the last
place per exponential, its relative error is at most (8 + 2)(d + 1) u, exponentials, products and sums counted. The
distances that were rounded add up to the whole distance x, and x exp(-x) <= 0.37, which is 0.37 u for each of n keys;
the sum over a block adds n u. With at most 14 keys in at most 15 blocks that is 170 u for l and as much for o, 4e-14
for o / l; the expected values need 30 u more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.numerics.merge import State, block_state, finish, log_sum_exp, merge, merge_normalized, shifted_exp

Array = NDArray[np.float64]

TOLERANCE = 5e-14
UNDERFLOW = 1e-300
"""Times the largest value: what weights in the subnormal range may be off by."""
HEAD_DIM_V = 2
LARGEST = float(np.finfo(np.float64).max)


@pytest.fixture(autouse=True)
def no_overflow_and_no_nan() -> Iterator[None]:
    with np.errstate(all="raise", under="ignore"):
        yield


class Keys(NamedTuple):
    """scores (rows, keys), values (keys, Dv)."""

    scores: Array
    values: Array

    def take(self, index: NDArray[np.intp]) -> Keys:
        return Keys(self.scores[:, index], self.values[index])

    @property
    def state(self) -> State:
        return block_state(*self)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
MASKED = st.just(-math.inf)
NEAR = st.floats(-50, 50) | MASKED
MODERATE = st.floats(-1000, 1000) | MASKED
EXTREME = st.sampled_from([1e300, -1e300, math.nextafter(1e300, 0), LARGEST, -LARGEST, 1e-300, -1e-300, 5e-324, -0.0])
SCORES = st.sampled_from([NEAR, MODERATE, FINITE, NEAR | EXTREME | FINITE | MASKED])
"""Drawn once for a block, so that blocks whose scores are all of one size are as frequent as mixtures."""
VALUE = st.floats(-10, 10)


@st.composite
def keys(draw: st.DrawFn, max_size: int = 14, score: st.SearchStrategy[float] | None = None, rows: int = 3) -> Keys:
    """Some keys, perhaps none; up to two rows see none of them."""
    count = draw(st.integers(0, max_size))
    score = draw(SCORES) if score is None else score
    scores = [draw(st.lists(score, min_size=count, max_size=count)) for _ in range(rows)]
    values = draw(st.lists(st.tuples(*[VALUE] * HEAD_DIM_V), min_size=count, max_size=count))
    table = np.array(scores, dtype=np.float64).reshape(rows, count)
    table[draw(st.lists(st.integers(0, rows - 1), max_size=2)), :] = -math.inf
    return Keys(table, np.array(values, dtype=np.float64).reshape(count, HEAD_DIM_V))


def states() -> st.SearchStrategy[State]:
    return keys(max_size=5).map(lambda k: k.state)


def softmax(all_keys: Keys) -> tuple[Array, Array, Array]:
    """O (rows, Dv), the LSE (rows, 1), and the same mean as O of |values|, to measure errors with."""
    scores, values = all_keys
    o, lse = np.zeros((len(scores), HEAD_DIM_V)), np.full((len(scores), 1), -math.inf)
    size = np.zeros_like(o)
    for row, of_row in enumerate(scores.tolist()):
        m = max(of_row, default=-math.inf)
        if m > -math.inf:
            weights = [math.exp(s - m) for s in of_row]
            total = math.fsum(weights)
            lse[row] = m + math.log(total)
            for d, column in enumerate(values.T.tolist()):
                o[row, d] = math.fsum(w * v for w, v in zip(weights, column, strict=True)) / total
                size[row, d] = math.fsum(w * abs(v) for w, v in zip(weights, column, strict=True)) / total
    return o, lse, size


def assert_within(given_: Array, expected: Array, size: Array, tolerance: float = TOLERANCE) -> None:
    """Shapes are equal, infinities are in their place, and errors are small beside `size`."""
    assert given_.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(given_[~finite], expected[~finite])
    assert np.isfinite(given_[finite]).all()
    allowed = tolerance * size + UNDERFLOW * 10
    assert (np.abs(given_[finite] - expected[finite]) <= allowed[finite]).all(), (given_, expected)


def assert_is_softmax(result: tuple[Array, Array], all_keys: Keys, tolerance: float = TOLERANCE) -> None:
    o, lse, size = softmax(all_keys)
    assert_within(result[0], o, size, tolerance)
    assert_within(result[1], lse, np.maximum(1.0, np.abs(np.where(np.isfinite(lse), lse, 0.0))), tolerance)


def assert_same_state(a: State, b: State, size: State) -> None:
    """`size` is the state with the values' magnitudes in place of the values."""
    np.testing.assert_array_equal(a.m, b.m)
    assert_within(a.l, b.l, size.l)
    assert_within(a.o, b.o, size.o)


def magnitude(state: State) -> State:
    return state._replace(o=np.abs(state.o))


@given(states(), states())
def test_commutative(a: State, b: State) -> None:
    """To the last bit."""
    for left, right in zip(merge(a, b), merge(b, a), strict=True):
        np.testing.assert_array_equal(left, right)


@given(states(), states(), states())
def test_associative(a: State, b: State, c: State) -> None:
    size = merge(merge(magnitude(a), magnitude(b)), magnitude(c))
    assert_same_state(merge(merge(a, b), c), merge(a, merge(b, c)), size)


@given(states())
def test_neutral_element(a: State) -> None:
    """To the last bit, and the state of a block without keys is that element."""
    rows = len(a.m)
    neutral = State(np.full((rows, 1), -np.inf), np.zeros((rows, 1)), np.zeros((rows, HEAD_DIM_V)))
    of_no_keys = block_state(np.empty((rows, 0)), np.empty((0, HEAD_DIM_V)))
    masked = block_state(np.full((rows, 4), -np.inf), np.ones((4, HEAD_DIM_V)))
    for result, expected in ((merge(a, neutral), a), (merge(neutral, a), a), (of_no_keys, neutral), (masked, neutral)):
        for mine, right in zip(result, expected, strict=True):
            np.testing.assert_array_equal(mine, right, strict=True)


WHOLE = st.integers(-(2**40), 2**40)


@given(data=st.data(), exponent=st.integers(-1000, 980), shift=WHOLE)
def test_shift_of_all_scores(data: st.DataObject, exponent: int, shift: int) -> None:
    """m moves, l and o do not, to the last bit: scores and shift are multiples of one power of two, their sum exact."""
    part = keys(max_size=6, score=WHOLE | MASKED)
    a, b = data.draw(part), data.draw(part)

    def merged(shift: int) -> State:
        first, second = (block_state(np.ldexp(k.scores + shift, exponent), k.values) for k in (a, b))
        return merge(first, second)

    still, moved = merged(0), merged(shift)
    np.testing.assert_array_equal(moved.m, still.m + math.ldexp(shift, exponent))
    np.testing.assert_array_equal(moved.l, still.l)
    np.testing.assert_array_equal(moved.o, still.o)


@given(all_keys=keys(), data=st.data())
def test_any_cut_in_any_order_is_the_safe_softmax(all_keys: Keys, data: st.DataObject) -> None:
    """Keys are shuffled and cut into blocks, some empty; then two random states become one until one is left."""
    count = len(all_keys.values)
    order = np.array(data.draw(st.permutations(range(count))), dtype=np.intp)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=14)))
    parts = [all_keys.take(order[i:j]).state for i, j in zip([0, *cuts], [*cuts, count], strict=True)]
    while len(parts) > 1:
        a, b = (parts.pop(data.draw(st.integers(0, len(parts) - 1))) for _ in range(2))
        parts.append(merge(a, b))
    assert_is_softmax(finish(parts[0]), all_keys)


@given(all_keys=keys(), data=st.data())
def test_order_of_the_keys_in_a_block(all_keys: Keys, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(all_keys.values)))), dtype=np.intp)
    size = block_state(all_keys.scores, np.abs(all_keys.values))
    assert_same_state(all_keys.take(order).state, all_keys.state, size)


@given(keys(score=FINITE), keys())
@example(
    Keys(np.array([[LARGEST, -LARGEST]]), np.ones((2, HEAD_DIM_V))),
    Keys(np.array([[-LARGEST, -math.inf]]), np.ones((2, HEAD_DIM_V))),
)
def test_stays_in_range(a: Keys, b: Keys) -> None:
    """No overflow, which the fixture turns into an error, and no NaN, whatever the scores; O is a mean of values."""
    state = merge(a.state, b.state)
    o, lse = finish(state)
    count = len(a.values) + len(b.values)
    seen = np.isfinite(state.m)
    assert ((state.l >= 1) & (state.l <= count * (1 + TOLERANCE)))[seen].all()
    assert (np.isfinite(lse) == seen).all()
    assert (lse < np.inf).all()
    assert not state.l[~seen].any()
    assert not o[~seen[:, 0]].any()
    largest = np.abs(np.concatenate([a.values, b.values])).max(axis=0, initial=0.0)
    assert (np.abs(o) <= largest * (1 + TOLERANCE)).all()


@given(keys(score=MODERATE), st.integers(-5, 5))
def test_scale_in_the_exponent(part: Keys, exponent: int) -> None:
    """A kernel keeps m in raw scores and scales distances: the same to the last bit, if the scale is a power of two."""
    scale = 2.0**exponent
    m = part.scores.max(axis=1, keepdims=True, initial=-np.inf)
    total = shifted_exp(part.scores, m, scale).sum(axis=1, keepdims=True)
    scaled = block_state(scale * part.scores, part.values)
    np.testing.assert_array_equal(total, scaled.l)
    np.testing.assert_array_equal(log_sum_exp(m, total, scale), finish(scaled)[1])


def test_nan_in_a_value() -> None:
    """It spoils the rows that see any key, in its block or another, and no row that sees none."""
    nan, fine = np.full((2, HEAD_DIM_V), np.nan), np.ones((2, HEAD_DIM_V))
    hidden, seen = np.full((1, 2), -np.inf), np.zeros((1, 2))
    masked = block_state(np.concatenate([hidden, hidden]), nan)
    o, lse = finish(merge(masked, block_state(np.concatenate([hidden, seen]), fine)))
    assert not o[0].any()
    assert np.isnan(o[1]).all()
    np.testing.assert_allclose(lse, [[-np.inf], [math.log(2)]], rtol=1e-15)


def test_leading_dimensions() -> None:
    """Two batches of three heads, each with scores and values of its own, are as good as six calls."""
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 5, 6))
    scores[0, 1, 2] = -np.inf
    o, lse = finish(
        merge(block_state(scores[..., :2], values[..., :2, :]), block_state(scores[..., 2:], values[..., 2:, :]))
    )
    assert (o.shape, lse.shape) == ((2, 3, 4, 6), (2, 3, 4, 1))
    for b, h in np.ndindex(2, 3):
        alone = finish(block_state(scores[b, h], values[b, h]))
        np.testing.assert_allclose(o[b, h], alone[0], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(lse[b, h], alone[1], rtol=1e-13, atol=1e-15)


@given(st.lists(keys(max_size=4, score=MODERATE), min_size=1, max_size=3))
def test_normalized_parts(parts: list[Keys]) -> None:
    """Rounding an LSE of up to 1000 changes weights by up to 512 u, 6e-14, and no part goes through more than three."""
    o, lse = finish(parts[0].state)
    for part in parts[1:]:
        o, lse = merge_normalized(o, lse, *finish(part.state))
    together = Keys(np.concatenate([p.scores for p in parts], axis=1), np.concatenate([p.values for p in parts]))
    assert_is_softmax((o, lse), together, 1e-12)


@given(keys(score=MODERATE))
def test_a_part_that_saw_nothing_is_not_read(part: Keys) -> None:
    """Split-KV decode may leave anything in the O of a split without keys."""
    o, lse = finish(part.state)
    nothing = np.full_like(o, np.nan), np.full_like(lse, -np.inf)
    for result in (merge_normalized(o, lse, *nothing), merge_normalized(*nothing, o, lse)):
        np.testing.assert_array_equal(result[0], o)
        np.testing.assert_array_equal(result[1], lse)
