"""What each verb computes. Arrays are float64 whatever the dtype of the tile; row vectors have shape (rows, 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashsim.numerics.merge import log_sum_exp, normalize, shifted_exp

Array = NDArray[np.float64]


MAP: dict[str, Callable[[Array, Array, float], Array]] = {
    "exp": shifted_exp,
    "exp_lse": lambda tile, lse, scale: shifted_exp(scale * tile, lse),
    "rescale_factor": shifted_exp,
    "add": lambda tile, other, _: tile + other,
    "sub": lambda tile, other, _: tile - other,
    "mul": lambda tile, factor, _: tile * factor,
    "div": lambda tile, total, _: normalize(tile, total),
    "lse": log_sum_exp,
}
"""Elementwise verbs of two operands; the last argument is the softmax scale."""

HADAMARD_SEED = 0
"""Of the random signs: Q and K are multiplied by the same matrix."""

REDUCE: dict[str, Callable[[Array, Array], Array]] = {
    "max": lambda tile, into: np.maximum(into, tile.max(axis=1, keepdims=True)),
    "abs_max": lambda tile, into: np.maximum(into, np.abs(tile).max(axis=1, keepdims=True)),
    "sum": lambda tile, into: into + tile.sum(axis=1, keepdims=True),
}
"""Row reductions that accumulate."""
