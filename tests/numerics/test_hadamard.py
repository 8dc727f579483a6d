"""The fast Hadamard transform: against the matrix itself; Q K^T stays as it is, outliers are spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.hadamard import hadamard_dim, hadamard_transform, inverse_hadamard_transform

PADDED = {1: 1, 2: 2, 3: 4, 8: 8, 64: 64, 80: 128, 96: 128, 128: 128, 192: 256, 256: 256}


def matrix(dim: int) -> NDArray[np.float64]:
    """H / sqrt(dim) from its definition, the parity of the bits that row and column have in common."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]) / dim**0.5


def outliers(*shape: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 100, 1)


@pytest.mark.parametrize(("head_dim", "padded"), PADDED.items())
def test_it_is_the_product_with_the_matrix(head_dim: int, padded: int) -> None:
    """Over the last axis, padded with zeros; more rows than are transformed together, and not a multiple of them."""
    x = outliers(3, 171, 2, head_dim)
    given = x.copy()
    y = hadamard_transform(x)
    assert hadamard_dim(head_dim) == padded
    np.testing.assert_allclose(y, x @ matrix(padded)[:head_dim], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(x, given)


@pytest.mark.parametrize("head_dim", PADDED)
def test_signs_come_first_and_are_those_of_the_seed(head_dim: int) -> None:
    padded = PADDED[head_dim]
    rows = hadamard_transform(np.eye(head_dim), 3)
    signs = rows[:, 0] * padded**0.5  # the first column of H is ones
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-15)
    np.testing.assert_allclose(rows, signs[:, None] * matrix(padded)[:head_dim], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(rows, hadamard_transform(np.eye(head_dim), 3))
    if head_dim >= 64:
        assert 0.3 < np.mean(signs > 0) < 0.7
        assert not np.array_equal(rows, hadamard_transform(np.eye(head_dim), 4))


@given(
    head_dim=st.integers(1, 256),
    seed=st.none() | st.integers(0, 2**64),
    rows=st.integers(0, 5),
)
def test_it_is_orthogonal_and_leaves_scores_as_they_are(head_dim: int, seed: int | None, rows: int) -> None:
    q, k = outliers(2, 4, head_dim), outliers(rows, head_dim)
    q_spread, k_spread = hadamard_transform(q, seed), hadamard_transform(k, seed)
    size = np.abs(q).max() * np.abs(k).max(initial=1) * head_dim
    np.testing.assert_allclose(q_spread @ k_spread.T, q @ k.T, rtol=0, atol=1e-15 * size)
    np.testing.assert_allclose(np.linalg.norm(q_spread, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-13)
    back = inverse_hadamard_transform(q_spread, head_dim, seed)
    np.testing.assert_allclose(back, q, rtol=0, atol=1e-13 * np.abs(q).max())


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_scores_are_unchanged_to_12_digits(head_dim: int) -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((300, head_dim)), rng.standard_normal((200, head_dim))
    np.testing.assert_allclose(hadamard_transform(q, 5) @ hadamard_transform(k, 5).T, q @ k.T, rtol=0, atol=1e-12)


def test_an_outlier_is_spread_over_its_row() -> None:
    x = np.zeros((1, 128))
    x[0, 17] = 100
    np.testing.assert_allclose(np.abs(hadamard_transform(x, 0)), 100 / 128**0.5)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError) as caught:
        hadamard_transform(np.zeros((3, 0)), -1)
    assert caught.value.problems == (
        "x: the last axis must have at least 1 number, got shape (3, 0)",
        "seed: must not be negative, got -1",
    )
    with pytest.raises(InputError, match="x: the last axis must have at least 1 number, got shape \\(\\)"):
        hadamard_transform(3.0)
    with pytest.raises(InputError, match="x: must be an array of numbers, got str"):
        hadamard_transform("text")
    for columns, head_dim in ((128, 64), (128, 129), (96, 96), (1, 0)):
        with pytest.raises(InputError, match=f"head_dim: {head_dim} is not padded to the {columns} columns of y"):
            inverse_hadamard_transform(np.zeros((2, columns)), head_dim)
