"""What roundings do to the probabilities of one piece of attention: the terms that the bounds are made of.

Write u for the unit roundoff of P's dtype and t for half its smallest subnormal, but at least 2^-126, below which fp32
arithmetic may flush to zero; p for the exact softmax; n for the number of keys that a row sees. All counts below are in
units of 2^-24, fp32's unit roundoff.

**P in its dtype.** A kernel rounds P_c = exp(S_c - m) with the maximum m of the tiles so far. Later tiles multiply it
by exp(m - m_final) <= 1, and so its error: at most u P_c + t when it was rounded, at most u p_c + t / l in the end,
whatever the m was. Below t, P_c becomes 0 and the error p_c has always the same sign (`lost`); above, errors are as
often up as down (`random`), with a variance of at most a third of the square.

**Equal numbers** have equal errors, and those add up instead of cancelling. Where at most a of n numbers differ by
less than u / 8, n errors with standard deviation 1 sum to one of at most sqrt(a n), by Cauchy-Schwarz.

**Sums of n terms in fp32.** Relative to the sum of sizes, n additions are off by at most spread(n, a) = min(n, 6
sqrt(a n / 3)): errors uniform within one unit sum to more with probability at most 2 exp(-18), 3 in 100 million
(Hoeffding; Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019). Tensor cores truncate:
two units at most, one on average, once for 8 products (16 on Hopper; Fasi et al., "Numerical behavior of NVIDIA tensor
cores", 2021), hence gamma(n, a) = min(2 n, spread(n, a) + n / 8).

**Logits.** What exp gets and gives: gamma(D, a) for the dot product, whose terms are alike where factors in q and in k
are; 4 for scaling, changing to base 2 and subtracting the maximum; both relative to scale * sum_d |q_d k_d|, whose
largest value over the row's keys counts; 4 for exp2 (two ulps, as `ex2.approx` has); 4 spread(r, 1) for the exp2 of
the r = ceil(n / BLOCK_N) rescalings. All of these are in l as they are in O, so they act like an error of S, at most
`logits`.

Where S itself is stored in a narrow format, as unfused attention does, that rounding, u |S| + t, is a part of `logits`.

**Sums.** O and l are summed and rescaled apart: `product` = gamma(n, a) + spread(r, 1) on tensor cores, `total` =
spread(n, a) + spread(r, 1) elsewhere.

**Dropout.** With w = keep / (1 - dropout), O = sum_c p_c w_c v_c: the attention of values w_c v_c, which differ from
row to row. l sums all keys, kept or not, so p and its errors are what they are without dropout, and every bound holds
with w_c v_c for v_c: a dropped key adds no error to O, a kept one 1 / (1 - dropout) times as much. That is so where the
kernel multiplies O or the sum at the end, and more than enough where it multiplies P before it rounds: t, and what
becomes 0, is then not multiplied. The factor is in fp32: dropout itself, dropout / (1 - dropout) units; the difference,
the quotient and the product, 3; they are a part of `product`, relative to sum_c p_c w_c |v_c|. All keys are counted in
n and a, kept or not, and rows are different if their p are: fewer numbers are alike, never more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashsim.numerics.layout import Float, Piece
from flashsim.numerics.rounding import Format

FP32_UNIT = 2.0**-24
FLUSHED = 2.0**-126
"""fp32 numbers below this may become 0, as `ex2.approx.ftz` makes them."""
LAMBDA = 6.0
"""Standard deviations that a sum of independent errors may reach."""
SCORE, EXP, DIVIDE, LOG = 4, 4, 3, 4
"""fp32 units: scores after their dot product, exp2, reciprocal and product, log2."""
DROPOUT = 3
"""fp32 units: 1 - dropout, its reciprocal and the product with it; dropout's own rounding depends on dropout."""
ALIKE = 1 / 8
"""Numbers that differ by less than this part of a unit roundoff are taken to have one common rounding error."""


def tiny(form: Format) -> float:
    """What a number in `form` may be off by however small it is: half the smallest subnormal, or what fp32 flushes."""
    return max(form.tiny_roundoff, FLUSHED)


def spread(n: Float | float, alike: Float | float = 1.0) -> Float:
    """What `n` errors, uniform within one unit and never more than `alike` of them equal, come to at most."""
    return np.minimum(n, LAMBDA * np.sqrt(alike * n / 3.0))


def gamma(n: Float | float, alike: Float | float = 1.0) -> Float:
    """fp32 units by which a product's sum of `n` terms can be off, relative to the sum of their sizes."""
    return np.minimum(2.0 * n, spread(n, alike) + n / 8)


def dropout_units(dropout: float) -> float:
    """fp32 units by which a product with 1 / (1 - dropout) can be off, 0 without dropout."""
    return DROPOUT + dropout / (1 - dropout) if dropout else 0.0


def share_of_rows(sizes: Float) -> float:
    """(sum_i s_i)^2 / (n sum_i s_i^2) for the means s_i of n rows of (B, S, H, D): 1, or 1 / n where one row has all.

    A sum of n independent numbers of these sizes is relatively as steady as one of this part of them, equally large.
    """
    rows = np.mean(sizes / max(np.max(sizes, initial=0.0), 1e-300), axis=3)
    return float(np.mean(rows)) ** 2 / float(np.mean(rows**2)) if rows.any() else 1.0


def most_alike(steps: Float) -> Float:
    """How often the most frequent number of each row occurs, (rows, 1); NaN equals nothing."""
    if not steps.size:
        return np.ones((len(steps), 1))
    steps, at = np.sort(steps, axis=1), np.arange(steps.shape[1])
    first = np.concatenate([np.ones((len(steps), 1), bool), steps[:, 1:] != steps[:, :-1]], axis=1)
    since = at - np.maximum.accumulate(np.where(first, at, 0), axis=1)
    most: Float = since.max(axis=1, keepdims=True) + 1.0
    return most


def equal_factors(x: Float, y: Float) -> Float:
    """How many products x_id y_jd can be alike for equal factors, for each row i of x (rows, D) and any j of y."""
    alike: Float = np.minimum(most_alike(np.abs(x)), most_alike(np.abs(y)).max(initial=1.0))
    return alike


def fingerprints(steps: Float) -> NDArray[np.uint64]:
    """A number for each row, equal for equal rows."""
    bits = np.nan_to_num(steps, nan=-1e9, neginf=-1e8).astype(np.int64).astype(np.uint64)
    index = np.arange(1, steps.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    weights = (index ^ (index >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    sums: NDArray[np.uint64] = np.sum(bits * weights, axis=1, dtype=np.uint64)
    return sums


class Terms(NamedTuple):
    """Errors of the normalized probabilities of a piece; all arrays are (rows, keys) or (rows, 1)."""

    p: Float
    lse: Float
    """-inf where a row sees no key."""
    random: Float
    lost: Float
    logits: Float
    product: Float
    total: Float
    seen: NDArray[np.bool_]
    steps: Float
    """(S - m) in steps of u / 8, NaN where masked: equal for keys whose P rounds alike."""
    alike: Float
    """The most keys of each row that round alike."""


def error_terms(
    piece: Piece,
    scale: float,
    form: Format,
    p_scale: float = 1.0,
    BLOCK_N: int = 16,
    accumulator: float = FP32_UNIT,
    scores_form: Format | None = None,
) -> Terms:
    """The terms derived above for the rows of `piece`, whose P is multiplied by `p_scale` and rounded to `form`.

    `accumulator` is the unit roundoff of the tensor cores' sums; `scores_form` the format in which S is stored, if one.
    """
    head_dim, wide = piece.q.shape[1], accumulator / FP32_UNIT
    seen = np.any(piece.allowed, axis=1, keepdims=True)
    n = np.sum(piece.allowed, axis=1, keepdims=True).astype(np.float64)
    rescales = np.ceil(n / BLOCK_N)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        s = np.where(piece.allowed, piece.q @ piece.k.T * scale, -np.inf)
        depth = s - np.where(seen, s.max(axis=1, keepdims=True), 0.0)
        exp = np.exp(depth)
        sum_exp = np.where(seen, exp.sum(axis=1, keepdims=True), 1.0)
        lse = np.where(seen, s.max(axis=1, keepdims=True) + np.log(sum_exp), -np.inf)
        p = exp / sum_exp
        least = tiny(form) / p_scale
        kept = exp > least
        random = np.where(kept, form.unit_roundoff * p + least / sum_exp, 0.0)
        size = np.where(piece.allowed, np.abs(piece.q) @ np.abs(piece.k).T, 0.0).max(axis=1, keepdims=True)
        scores = (wide * gamma(head_dim, equal_factors(piece.q, piece.k)) + SCORE) * abs(scale) * size
        logits = (scores + EXP + EXP * spread(rescales)) * FP32_UNIT
        if scores_form:
            largest = np.where(piece.allowed, np.abs(s), 0.0).max(axis=1, keepdims=True, initial=0.0)
            logits += scores_form.unit_roundoff * largest + scores_form.tiny_roundoff
        steps = np.where(piece.allowed, np.rint(depth / (ALIKE * form.unit_roundoff)), np.nan)
        alike = most_alike(steps)
        product = (wide * gamma(n, alike) + spread(rescales) + dropout_units(piece.dropout)) * FP32_UNIT
        total = (spread(n, alike) + spread(rescales)) * FP32_UNIT
    return Terms(p, lse, random, np.where(kept, 0.0, p), logits, product, total, seen, steps, alike)
