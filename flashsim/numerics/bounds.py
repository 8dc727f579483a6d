"""How far a correct low-precision kernel can be from the truth, however lucky the computation it is held against.

A fused kernel rounds twice in its own dtype: the unnormalized P = exp(S - m) before P V, and O at the end. Everything
else is fp32. Write u for the dtype's unit roundoff and t for half its smallest subnormal; p is the exact softmax, l the
exact sum of exp(S - m). Then for every element of O, to first order:

    rounding P           e_c <= u * p_c + t / l, so at most  E = sum_c e_c |v_c|
    rounding O           at most  R = u * |o| + t
    scores in fp32       |dS| <= sqrt(D) * 2^-23 * scale * max_c sum_d |q_d k_cd|, and changes o by at most
                         2 |dS| sum_c p_c |v_c|, since dp_c = p_c (dS_c - sum_b p_b dS_b)
    exp, sums, rescaling at most  (sqrt(Sk) + 4) * 2^-23 * sum_c p_c |v_c|

2^-23 is twice fp32's unit roundoff, because tensor cores truncate; square roots stand for the growth of sums of n
roundings (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019). E + R + fp32 bounds the
largest error. For the mean that would be far too wide: roundings of the keys of a row partly cancel, with standard
deviation at most sigma = sqrt(sum_c e_c^2 v_c^2 / 3), and so do the rows. The bound of the mean is the mean of
min(E, sigma + E / sqrt(rows)) + R + fp32: E itself for one row, sigma for many. The LSE inherits |dS|.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError, unknown
from flashsim.numerics.layout import Float, check_inputs, pieces
from flashsim.numerics.rounding import FORMATS

FP32_STEP = 2.0**-23
FEW_STEPS = 4
"""Roundings of exp2, of its argument, of the last rescaling and of the division by l."""


class Bounds(NamedTuple):
    """`o` (B, Sq, Hq, Dv) and `lse` (B, Hq, Sq) bound each error, `o_mean` the mean error over all of O."""

    o: Float
    o_mean: float
    lse: Float


def rounding_bounds(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
) -> Bounds:
    """The bounds derived above, all zero in rows that see no key. Raises InputError for arguments that do not fit."""
    if dtype not in FORMATS:
        raise InputError(f"dtype: {unknown('dtype', dtype, FORMATS)}")
    u, t = FORMATS[dtype].unit_roundoff, FORMATS[dtype].tiny_roundoff
    inputs = check_inputs(q, k, v, scale)
    batch, seqlen_q, heads_q, head_dim = inputs.q.shape
    seqlen_k = inputs.k.shape[1]
    worst = np.zeros((batch, seqlen_q, heads_q, inputs.v.shape[3]))  # E
    sigma, others = np.zeros_like(worst), np.zeros_like(worst)
    lse = np.zeros((batch, heads_q, seqlen_q))
    rows = 0
    if seqlen_k == 0:
        return Bounds(worst, 0.0, lse)
    for piece in pieces(inputs, mask):
        at = (piece.batch, piece.rows, piece.head)
        seen = np.any(piece.allowed, axis=1, keepdims=True)
        rows += int(np.sum(seen))
        with np.errstate(invalid="ignore", over="ignore"):
            s = np.where(piece.allowed, piece.q @ piece.k.T * inputs.scale, -np.inf)
            exp = np.exp(s - np.where(seen, s.max(axis=1, keepdims=True), 0.0))
            total = np.where(seen, exp.sum(axis=1, keepdims=True), 1.0)
            p = exp / total
            e = np.where(piece.allowed, u * p + t / total, 0.0)
            magnitude = np.where(piece.allowed, np.abs(piece.q) @ np.abs(piece.k).T, 0.0).max(axis=1, keepdims=True)
            ds = head_dim**0.5 * FP32_STEP * abs(inputs.scale) * magnitude
            fp32 = (2 * ds + (seqlen_k**0.5 + FEW_STEPS) * FP32_STEP) * (p @ np.abs(piece.v))
            worst[at] = e @ np.abs(piece.v)
            sigma[at] = np.sqrt(e**2 @ piece.v**2 / 3)
            others[at] = np.where(seen, u * np.abs(p @ piece.v) + t, 0.0) + fp32
        lse[piece.batch, piece.head, piece.rows] = ds[:, 0]
    mean = float(np.mean(np.minimum(worst, sigma + worst / max(1, rows) ** 0.5) + others)) if worst.size else 0.0
    return Bounds(worst + others, mean, lse)
