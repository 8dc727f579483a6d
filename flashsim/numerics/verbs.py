"""What each verb computes. Arrays are float64 whatever the dtype of the tile; row vectors have shape (rows, 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _exp(scores: Array, m: Array, scale: float) -> Array:
    """exp(scale (scores - m)); a row that has seen no key yet has m = -inf and gives 0, as the kernels guard it."""
    finite = np.where(np.isneginf(m), 0.0, m)
    return np.exp(scale * (scores - finite))


def _rescale_factor(m_old: Array, m: Array, scale: float) -> Array:
    """exp(scale (m_old - m)), 1 where both are -inf: nothing was accumulated and nothing is to be rescaled."""
    unchanged = m_old == m
    with np.errstate(invalid="ignore"):
        return np.where(unchanged, 1.0, np.exp(scale * (np.where(unchanged, 0.0, m_old) - np.where(unchanged, 0.0, m))))


def _div(tile: Array, total: Array, _: float) -> Array:
    return np.where(total == 0, 0.0, tile / np.where(total == 0, 1.0, total))


def _lse(m: Array, total: Array, scale: float) -> Array:
    """scale m + log(total), -inf where the total is 0."""
    with np.errstate(divide="ignore"):
        return np.where(total == 0, -np.inf, scale * np.where(np.isneginf(m), 0.0, m) + np.log(total))


MAP: dict[str, Callable[[Array, Array, float], Array]] = {
    "exp": _exp,
    "rescale_factor": _rescale_factor,
    "mul": lambda tile, factor, _: tile * factor,
    "div": _div,
    "lse": _lse,
}
"""Elementwise verbs of two operands; the last argument is the softmax scale."""

REDUCE: dict[str, Callable[[Array, Array], Array]] = {
    "max": lambda tile, into: np.maximum(into, tile.max(axis=1, keepdims=True)),
    "sum": lambda tile, into: into + tile.sum(axis=1, keepdims=True),
}
"""Row reductions that accumulate."""
