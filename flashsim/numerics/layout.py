"""Checked (batch, seqlen, heads, head_dim) arrays, taken apart into pieces of one head that are small in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashsim.errors import InputError
from flashsim.masks import parse_mask
from flashsim.numerics.philox import SEED, dropout_problems, keep

Float = NDArray[np.float64]
AnyFloat = TypeVar("AnyFloat", bound=NDArray[np.floating[Any]])

MAX_SCORES = 2**20
"""Scores held at a time: 8 MiB in float64."""


class Inputs(NamedTuple):
    """q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) in float64, the scale of the scores, and dropout."""

    q: Float
    k: Float
    v: Float
    scale: float
    dropout: float = 0.0
    dropout_seed: int = SEED


class Piece(NamedTuple):
    """Some rows of one head: q (rows, D), k (Sk, D), v (Sk, Dv), allowed (rows, Sk).

    `kept` (rows, Sk) is `philox.keep` of these rows, None without dropout.
    """

    batch: int
    head: int
    rows: slice
    q: Float
    k: Float
    v: Float
    allowed: NDArray[np.bool_]
    kept: NDArray[np.bool_] | None = None
    dropout: float = 0.0

    def drop(self, x: AnyFloat) -> AnyFloat:
        """x (rows, Sk) times w = keep / (1 - dropout), in the dtype of `x`; `x` itself without dropout.

        Infinity that is dropped becomes NaN, as where a kernel multiplies.
        """
        if self.kept is None:
            return x
        return x * (self.kept * x.dtype.type(1 / (1 - self.dropout)))  # type: ignore[return-value]


def _as_float64(name: str, given: ArrayLike, problems: list[str]) -> Float:
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        problems.append(f"{name}: must be an array of numbers, got {type(given).__name__}")
        return np.empty((0, 0, 0, 0))
    if array.ndim != 4:
        problems.append(f"{name}: must have 4 dimensions (batch, seqlen, heads, head_dim), got shape {array.shape}")
    return array


def check_inputs(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, scale: float | None, dropout: float = 0.0, dropout_seed: int = SEED
) -> Inputs:
    """The arrays as float64; `scale` defaults to 1 / sqrt(D). Batch, lengths and Dv may be 0, heads and D may not.

    Raises InputError with one line per mistake, each naming the argument.
    """
    unreadable: list[str] = []
    arrays = [_as_float64(name, given, unreadable) for name, given in (("q", q), ("k", k), ("v", v))]
    problems = unreadable + dropout_problems(dropout, dropout_seed)
    if unreadable:
        raise InputError(problems)
    qa, ka, va = arrays
    for name, array in (("k", ka), ("v", va)):
        if array.shape[0] != qa.shape[0]:
            problems.append(f"{name}: batch {array.shape[0]} differs from {qa.shape[0]} of q")
    if va.shape[1:3] != ka.shape[1:3]:
        problems.append(f"v: (seqlen, heads) {va.shape[1:3]} differs from {ka.shape[1:3]} of k")
    if ka.shape[3] != qa.shape[3]:
        problems.append(f"k: head_dim {ka.shape[3]} differs from {qa.shape[3]} of q")
    if qa.shape[3] == 0:
        problems.append("q: head_dim must be at least 1, got 0")
    heads_q, heads_kv = qa.shape[2], ka.shape[2]
    if heads_q == 0:
        problems.append("q: must have at least 1 head, got 0")
    if heads_kv == 0 or heads_q % heads_kv:
        problems.append(f"k: {heads_kv} heads do not divide the {heads_q} of q")
    if scale is not None and not math.isfinite(scale):
        problems.append(f"scale: must be finite, got {scale}")
    if problems:
        raise InputError(problems)
    factor = qa.shape[3] ** -0.5 if scale is None else float(scale)
    return Inputs(qa, ka, va, factor, float(dropout), int(dropout_seed))


def pieces(inputs: Inputs, mask: str) -> Iterator[Piece]:
    """All rows of all heads, a piece at a time; query head h reads KV head h // (Hq / Hkv).

    Raises InputError if `mask` is not one that exists, or does not go with the sizes.
    """
    rule = parse_mask(mask)
    batch, seqlen_q, heads_q, _ = inputs.q.shape
    seqlen_k, heads_kv = inputs.k.shape[1:3]
    if complaints := rule.complaints(batch, seqlen_q, seqlen_k):
        raise InputError([f"mask: {line}" for line in complaints])
    step = max(1, MAX_SCORES // max(1, seqlen_k))
    cols = np.arange(seqlen_k)
    for b in range(batch):
        for h in range(heads_q):
            kv = h // (heads_q // heads_kv)
            for start in range(0, seqlen_q, step):
                rows = slice(start, min(start + step, seqlen_q))
                indices = np.arange(rows.start, rows.stop)
                visible = rule.allowed(indices, cols, seqlen_q, seqlen_k, b)
                kept = keep(indices, cols, b, h, inputs.dropout, inputs.dropout_seed) if inputs.dropout else None
                q, k, v = inputs.q[b, rows, h], inputs.k[b, :, kv], inputs.v[b, :, kv]
                yield Piece(b, h, rows, q, k, v, visible, kept, inputs.dropout)
