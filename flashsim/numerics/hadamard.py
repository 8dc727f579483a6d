"""The fast Walsh-Hadamard transform with random signs, which spreads outliers over a whole row of Q or K.

FlashAttention-3 (arXiv 2407.08608), section 3.3, incoherent processing: Q and K are multiplied by
diag(signs) H / sqrt(D) before they are quantized. The matrix is orthogonal, so Q K^T stays as it is, and a number that
was large in one column becomes D numbers of an ordinary size. H is Sylvester's: H[i, j] = (-1)**popcount(i & j).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError
from flashsim.numerics.layout import Float

_ROWS = 512
"""Rows transformed together: at head_dim 128 and in float64, 512 KiB stay in a core's cache for all passes."""


def hadamard_dim(head_dim: int) -> int:
    """The power of two that a row of `head_dim` numbers is padded to: 64, 128 and 256 stay, 80 and 96 become 128."""
    return 1 << (head_dim - 1).bit_length()


def hadamard_transform(x: ArrayLike, seed: int | None = None) -> Float:
    """x (..., D) times diag(signs) H / sqrt(D'), as (..., D') in float64, in O(D' log D') operations for a row.

    D' is the next power of two; a row is padded with zeros, which changes no dot product of two rows. The signs are a
    function of `seed` and D'; without a seed they are all +1. Raises InputError if `x` is no array of numbers with a
    last axis of at least 1, or `seed` is negative.
    """
    values, signs = _checked(x, seed)
    padded = np.zeros((*values.shape[:-1], len(signs)))
    np.multiply(values, signs[: values.shape[-1]], out=padded[..., : values.shape[-1]])
    return _transformed(padded)


def inverse_hadamard_transform(y: ArrayLike, head_dim: int, seed: int | None = None) -> Float:
    """x (..., head_dim) of y = hadamard_transform(x, seed) (..., D').

    Raises InputError as that does, and if D' is not what `head_dim` is padded to.
    """
    values, signs = _checked(y, seed)
    if head_dim < 1 or values.shape[-1] != hadamard_dim(head_dim):
        raise InputError(f"head_dim: {head_dim} is not padded to the {values.shape[-1]} columns of y")
    x: Float = (_transformed(values) * signs)[..., :head_dim]
    return x


def _checked(x: ArrayLike, seed: int | None) -> tuple[Float, Float]:
    """The array in float64 and the signs of its columns, padding included."""
    problems = []
    try:
        values = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros(1)
        problems.append(f"x: must be an array of numbers, got {type(x).__name__}")
    if values.ndim == 0 or values.shape[-1] == 0:
        problems.append(f"x: the last axis must have at least 1 number, got shape {values.shape}")
    if seed is not None and seed < 0:
        problems.append(f"seed: must not be negative, got {seed}")
    if problems:
        raise InputError(problems)
    dim = hadamard_dim(values.shape[-1])
    signs = np.ones(dim) if seed is None else np.random.default_rng(seed).choice((-1.0, 1.0), dim)
    return values, signs


def _transformed(x: Float) -> Float:
    """x (..., D) times H / sqrt(D), D being a power of two."""
    dim = x.shape[-1]
    rows = x.reshape(-1, dim)
    result = np.empty(rows.shape)
    for first in range(0, len(rows), _ROWS):
        # Columns first: each butterfly then adds and subtracts long runs of memory.
        some = np.ascontiguousarray(rows[first : first + _ROWS].T)
        half = 1
        while half < dim:
            pairs = some.reshape(dim // (2 * half), 2, half, -1)
            some = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).reshape(dim, -1)
            half *= 2
        result[first : first + _ROWS] = some.T
    result *= dim**-0.5
    return result.reshape(x.shape)
