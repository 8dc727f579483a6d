"""The terms of the bounds: what sums of rounded or truncated numbers can be off by."""

from __future__ import annotations

import numpy as np
import pytest

from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.error_terms import (
    FP32_UNIT,
    equal_factors,
    error_terms,
    fingerprints,
    gamma,
    most_alike,
    spread,
)
from flashsim.numerics.layout import Piece
from flashsim.numerics.rounding import FORMATS

f32 = np.float32


@pytest.mark.parametrize("n", [1, 7, 100, 10_000])
def test_sums_in_fp32_stay_within_their_bound(n: int) -> None:
    """One term after another, in all ways in which terms may be alike: drawn, equal, and equal but for their order."""
    rng = np.random.default_rng(n)
    drawn, two = rng.random(n).astype(f32), np.resize(np.array([1, 1 / 3], f32), n)
    for terms, alike in ((drawn, 1.0), (np.full(n, 1 / 3, f32), float(n)), (two, n / 2 + 1), (np.sort(drawn), 1.0)):
        error = abs(float(np.cumsum(terms)[-1]) - np.sum(terms.astype(np.float64)))
        assert error <= spread(n, alike) * FP32_UNIT * np.sum(terms)


def test_truncated_sums_stay_within_gamma() -> None:
    """Tensor cores cut bits off: eight products at a time, and every error has the same sign."""
    rng = np.random.default_rng(0)
    for n in (8, 512, 16384):
        terms, total = rng.random(n), 0.0
        for chunk in terms.reshape(-1, 8):
            mantissa, exponent = np.frexp(total + chunk.sum())
            total = np.ldexp(np.floor(mantissa * 2**24), exponent - 24)
        error = abs(total - terms.sum()) / (FP32_UNIT * terms.sum())
        assert error <= gamma(n)
    # This is what n / 8 is for: the square root alone would not do.
    assert error > spread(n)


def test_the_sum_of_a_row_stays_within_its_term() -> None:
    """l of 5000 keys, one after another, in rows whose exponentials are drawn, equal, or of two kinds."""
    rng = np.random.default_rng(0)
    q = np.ones((1, 1))
    for scores in (-5 * rng.random(5000), np.full(5000, -1.5), np.resize([0.0, -1.1], 5000)):
        k = np.append(scores, 0.0)[:, None]
        piece = Piece(0, 0, slice(0, 1), q, k, k, np.ones((1, 5001), bool))
        terms = error_terms(piece, 1.0, FORMATS["bf16"])
        exact = np.exp(k[:, 0])
        error = abs(float(np.cumsum(exact.astype(f32))[-1]) - exact.sum()) / exact.sum()
        assert FP32_UNIT < error <= terms.total.item() + FP32_UNIT


def test_the_number_of_rescalings_counts() -> None:
    q, k, v = (np.random.default_rng(0).standard_normal((1, 64, 1, 8)) for _ in range(3))
    narrow, wide = (rounding_bounds(q, k, v, "fp16", BLOCK_N=BLOCK_N).lse for BLOCK_N in (1, 64))
    assert (narrow > wide).all()


def test_equal_keys_err_together() -> None:
    """Probabilities that are all alike have one rounding error; their mean bound is the largest, not a root of it."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 64, 1, 8)), np.zeros((1, 64, 1, 8)), np.ones((1, 64, 1, 8))
    alike = rounding_bounds(q, k, v, "bf16")
    np.testing.assert_allclose(alike.o_mean, alike.o.mean())
    drawn = rounding_bounds(q, rng.standard_normal(k.shape), v, "bf16")
    assert drawn.o_mean < 0.8 * drawn.o.mean()


def test_what_is_alike_is_counted() -> None:
    nan = np.nan
    rows = np.array([[1.0, 2, 1, 3, 1], [nan, nan, nan, 4, 5], [7, 7, 7, 7, 7], [nan] * 5])
    np.testing.assert_array_equal(most_alike(rows), [[3], [1], [5], [1]])
    np.testing.assert_array_equal(most_alike(np.empty((2, 0))), [[1], [1]])
    x, y = np.array([[1.0, -1, 1, 2], [1, 2, 3, 4]]), np.array([[5.0, 5, 5, 5], [1, 2, 3, 4]])
    np.testing.assert_array_equal(equal_factors(x, y), [[3], [1]])


def test_fingerprints_tell_rows_apart() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (500, 6)).astype(float)
    rows[rng.random(rows.shape) < 0.2] = np.nan
    different = {tuple(row) for row in np.nan_to_num(rows, nan=99)}
    assert len(set(fingerprints(rows).tolist())) == len(different)
    assert fingerprints(np.array([[1.0, 2], [2, 1], [1, 2]])).tolist().count(fingerprints(np.array([[1.0, 2]]))[0]) == 2
