"""How far the gradients of a correct low-precision kernel can be from the truth.

FlashAttention-2's backward pass (algorithm 2) rounds to its dtype: O, which it is given; P, for dV = P^T dO; dS, for
dQ = scale dS K and dK = scale dS^T Q; and the results. P = exp(S - LSE) from the stored LSE, dP = dO V^T,
D = rowsum(dO * O) and dS = P * (dP - D) are fp32. With the terms of `error_terms.py`, u and t of the dtype:

    P           relative error at most eps = expm1(2 logits + total + (4 + 2 |LSE|) units): S anew, and the stored LSE
    D           O's error is sum_c e_c v_c for roundings e of P, so it changes D by sum_c e_c dP_c; that of storing O by
                sum_d |dO_d| R_d; fp32 errors of O likewise; and gamma(Dv) of its own sum
    dS          fp32: eps |dS| + (1 + eps) p (gamma(Dv) sum_d |dO_d v_d| + 3 units (|dP| + |D|)), and (1 + eps) p |D's|;
                rounding: u |dS| + t
    dQ          dS times |K|, but D's error is one number per row: times |sum_c p_c K_c| only; gamma(n, a) of the sum
    dK, dV      the same over the rows that see the key, of all heads of a group; for dV P's rounding u p + t, and eps p
    results     u |g| + t; for dK and dV once for each head, too, since flash-attn sums heads that it has rounded

As in `bounds.py`, that is the largest error; for the typical one, roundings of P, O and dS have standard deviations:
sqrt(a / 3) times their root of squares, times 1 + 6 / sqrt(N) for the mean over N different rows or keys. Where a row
has equal neighbors a counts them for dK and dV. No number may leave the dtype's range.

Unfused attention stores more in narrow formats. S is a part of `logits`, as in `error_terms.py`. P's errors and losses
are in dS as well, |dP - D| times; dP's, u |dP| + t, are in dS p times. D is summed from both: sum_c p_c (u |dP_c| + t)
and |dP_c| times P's errors. With dropout P and dP are stored twice, and t is multiplied by w in between.

With dropout, w = keep / (1 - dropout), v_c is w_c v_c for each row, as in `error_terms.py`: dP = (dO V^T) * w and
dV = (P * w)^T dO. Of that follows

    D           e_c w_c v_c . dO = e_c dP_c: as above
    dS          the product with w: 3 + dropout / (1 - dropout) units more of |dP| + |D|, since a kernel may multiply D
                by 1 - dropout, and dQ and dK by its reciprocal at the end. It then rounds (1 - dropout) dS, so t stands
                for t / (1 - dropout). Dropped elements have dS = - P D, and round as others do
    dQ, dK      D's error meets all of P, dropped or not; the same units more in the sums
    dV          w times P's errors, u p + t and eps p, as P is multiplied before it is rounded or dV at the end
    mean        N rows or keys as in `bounds.py`, times the share that has errors
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.bounds import check_dtypes, errors_of_o
from flashsim.numerics.error_terms import (
    ALIKE,
    FP32_UNIT,
    LAMBDA,
    LOG,
    Terms,
    dropout_units,
    equal_factors,
    error_terms,
    fingerprints,
    gamma,
    most_alike,
    share_of_rows,
    tiny,
)
from flashsim.numerics.gradients import Gradients, check_do, sum_groups
from flashsim.numerics.layout import Float, Piece, check_inputs, pieces
from flashsim.numerics.philox import SEED
from flashsim.numerics.rounding import FORMATS, Format

AROUND = 3
"""fp32 units: dP - D, its product with P, and the scale."""


class GradientBounds(NamedTuple):
    """`largest` bounds each element's error, `mean` the mean error of dq, dk and dv."""

    largest: Gradients
    mean: tuple[float, float, float]


class _Sum:
    """Errors of one gradient, summed over pieces: `random` at most, its standard deviation, and what has one sign."""

    def __init__(self, *shape: int) -> None:
        self.exact, self.random, self.sigma, self.fixed = (np.zeros(shape) for _ in range(4))

    def add(self, at: tuple[int, slice, int], exact: Float, random: Float, variance: Float, fixed: Float) -> None:
        self.exact[at] += exact
        self.random[at] += random
        # Errors of several pieces, or of heads, may be equal: standard deviations add up, not variances.
        self.sigma[at] += np.sqrt(variance)
        self.fixed[at] += fixed

    def store(self, form: Format) -> None:
        """Round the result to `form`, where there is any."""
        size = np.abs(self.exact) + self.random + self.fixed
        self.fixed += np.where(size > 0, form.unit_roundoff * size + tiny(form), 0.0)

    def sum_groups(self, heads_kv: int) -> None:
        self.exact, self.random, self.sigma, self.fixed = (
            sum_groups(x, heads_kv) for x in (self.exact, self.random, self.sigma, self.fixed)
        )

    def typical(self, different: int, unlike: bool) -> float:
        """Bound of the mean error, when `different` rows or keys have different errors, of sizes that are `unlike`."""
        number = max(1.0, different * (share_of_rows(self.sigma) if unlike else 1))
        random = np.minimum(self.random, self.sigma * (1 + LAMBDA / number**0.5))
        return float(np.mean(random + self.fixed)) if random.size else 0.0


class _Errors(NamedTuple):
    """Of dS (rows, keys), before it is rounded: fp32, and D's as its largest and typical random part and the rest."""

    ds: Float
    fp32: Float
    weight: Float
    eps: Float
    d_random: Float
    d_sigma: Float
    d_fixed: Float


def _errors_of_ds(piece: Piece, do: Float, terms: Terms, form: Format, scores_form: Format | None) -> _Errors:
    of_o = errors_of_o(piece, terms, form)
    lse = np.abs(np.where(terms.seen, terms.lse, 0.0))
    eps = np.where(terms.seen, np.expm1(2 * terms.logits + terms.total + (LOG + 2 * lse) * FP32_UNIT), 0.0)
    dp, o, size = piece.drop(do @ piece.v.T), piece.drop(terms.p) @ piece.v, np.abs(do)
    d = np.sum(do * o, axis=1, keepdims=True)
    ds, weight = terms.p * (dp - d), (1 + eps) * terms.p

    with np.errstate(divide="ignore"):
        alike_o = most_alike(np.rint(np.log(np.abs(o)) / (ALIKE * form.unit_roundoff)))
    variance_p = terms.alike * np.sum((of_o.factor * terms.random * dp) ** 2, axis=1, keepdims=True)
    variance_o = alike_o * np.sum((do * of_o.stored) ** 2, axis=1, keepdims=True)
    d_random = np.sum(of_o.factor * terms.random * np.abs(dp), axis=1, keepdims=True)
    d_random += np.sum(size * of_o.stored, axis=1, keepdims=True)
    d_sum = gamma(do.shape[1], most_alike(size)) * FP32_UNIT
    d_fixed = np.sum(size * (of_o.fp32 + d_sum * (np.abs(o) + of_o.worst + of_o.stored)), axis=1, keepdims=True)
    d_fixed += np.sum(of_o.factor * terms.lost * np.abs(dp), axis=1, keepdims=True)

    dp_sum = gamma(do.shape[1], equal_factors(do, piece.v)) * FP32_UNIT
    around = (AROUND + dropout_units(piece.dropout)) * FP32_UNIT
    fp32 = weight * (dp_sum * piece.drop(size @ np.abs(piece.v).T) + around * (np.abs(dp) + np.abs(d)))
    if scores_form:
        least = tiny(scores_form) / (1 - piece.dropout)
        of_dp = (scores_form.unit_roundoff * np.abs(dp) + least) * (2 if piece.dropout else 1)
        of_p = sum(_split(weight, scores_form))
        fp32 += weight * of_dp + of_p * np.abs(dp - d)
        d_fixed += np.sum(weight * of_dp + of_p * np.abs(dp), axis=1, keepdims=True)
    return _Errors(ds, eps * np.abs(ds) + fp32, weight, eps, d_random, np.sqrt((variance_p + variance_o) / 3), d_fixed)


def _split(size: Float, form: Format, scaled: float = 1.0) -> tuple[Float, Float]:
    """Rounding errors of numbers of this size that are as often up as down, and those of numbers that become 0.

    They may be rounded after they were multiplied by `scaled` <= 1, and divided by it later.
    """
    least = tiny(form) / scaled
    kept = size > least
    return np.where(kept, form.unit_roundoff * size + least, 0.0), np.where(kept, 0.0, size)


def gradient_bounds(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    do: ArrayLike,  # (B, Sq, Hq, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    BLOCK_N: int = 16,
    s_dtype: str | None = None,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> GradientBounds:
    """The bounds derived above; `BLOCK_N`, `s_dtype`, here of S and dP, and `dropout` as in `rounding_bounds`.

    Raises InputError for arguments that do not fit.
    """
    check_dtypes(dtype=dtype, **({"s_dtype": s_dtype} if s_dtype else {}))
    form, scores = FORMATS[dtype], FORMATS[s_dtype] if s_dtype else None
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    given = check_do(do, inputs)
    (batch, seqlen_q, heads_q, head_dim), (seqlen_k, heads_kv, head_dim_v) = inputs.q.shape, inputs.v.shape[1:]
    dq = _Sum(batch, seqlen_q, heads_q, head_dim)
    dk, dv = (_Sum(batch, seqlen_k, heads_q, width) for width in (head_dim, head_dim_v))
    rows: set[int] = set()
    keys: set[int] = set()
    factor = abs(inputs.scale)
    for piece in pieces(inputs, mask) if seqlen_k else ():
        at, head = (piece.batch, piece.rows, piece.head), (piece.batch, slice(None), piece.head)
        go, aq, ak, ago = given[at], np.abs(piece.q), np.abs(piece.k), np.abs(given[at])
        terms = error_terms(piece, inputs.scale, form, 1.0, BLOCK_N, scores_form=scores)
        e = _errors_of_ds(piece, go, terms, form, scores)
        size = np.abs(e.ds) + e.fp32 + e.weight * (e.d_random + e.d_fixed)
        random, lost = _split(size, form, 1 - inputs.dropout)
        rows.update(fingerprints(terms.steps[terms.seen[:, 0]]).tolist())
        if piece.rows.start == 0:
            keys.update(fingerprints(terms.steps.T).tolist())

        along = (np.abs(terms.p @ piece.k) + e.eps * (terms.p @ ak)) * (1 + e.eps)
        sums = terms.product + AROUND * FP32_UNIT
        dq.add(
            at,
            inputs.scale * (e.ds @ piece.k),
            factor * (random @ ak + e.d_random * along),
            factor**2 * (terms.alike * (random**2 @ ak**2) / 3 + (e.d_sigma * along) ** 2),
            factor * ((e.fp32 + lost + sums * size) @ ak + e.d_fixed * along),
        )
        alike = most_alike(terms.steps.T)
        sums = gamma(seqlen_q * heads_q / heads_kv, alike * heads_q / heads_kv) + AROUND
        sums = (sums + dropout_units(inputs.dropout)) * FP32_UNIT
        dk.add(
            head,
            inputs.scale * (e.ds.T @ piece.q),
            factor * ((random + e.weight * e.d_random).T @ aq),
            factor**2 * alike * ((random**2 / 3 + (e.weight * e.d_sigma) ** 2).T @ aq**2),
            factor * ((e.fp32 + lost + e.weight * e.d_fixed).T @ aq + sums * (size.T @ aq)),
        )
        random, lost = (piece.drop(x) for x in _split(e.weight, form))
        random *= 2 if scores and inputs.dropout else 1
        p = piece.drop(terms.p)
        dv.add(
            head,
            p.T @ go,
            random.T @ ago,
            alike * (random**2).T @ ago**2 / 3,
            (lost + e.eps * p).T @ ago + sums * (piece.drop(e.weight).T @ ago),
        )
    dq.store(form)
    for gradient in (dk, dv):
        if heads_q > heads_kv:
            gradient.store(form)
        gradient.sum_groups(heads_kv)
        gradient.store(form)
    unlike = inputs.dropout > 0  # rows and keys of which few elements are kept, or none
    return GradientBounds(
        Gradients(dq.random + dq.fixed, dk.random + dk.fixed, dv.random + dv.fixed),
        (dq.typical(len(rows), unlike), dk.typical(len(keys), unlike), dv.typical(len(keys), unlike)),
    )
