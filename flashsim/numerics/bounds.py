"""How far a correct low-precision kernel can be from the truth, however lucky the computation it is held against.

A fused kernel rounds twice in a low dtype: the unnormalized P = exp(S - m) before P V, and O at the end. The rest is
fp32. `error_terms.py` derives what each rounding does to the probabilities p; for every element of O it follows, with
u and t of O's dtype as there and A = sum_c p_c |v_c|:

    logits      errors of at most x in S change p_c by at most p_c (1 - p_c) expm1(2 x), so o by at most
                expm1(2 logits) sum_c p_c (1 - p_c) |v_c|
    sums        of the numerator expm1(product) A; of l, with 3 units for reciprocal and product of the division,
                expm1(total + 3 units) |o|
    P           sum_c (random_c + lost_c) |v_c| =: E
    products    one error acts on what another has changed: the three above times
                F = exp(2 logits + product + total + 3 units)
    O           R = u (|o| + all of the above) + t
    largest     F (E + logits + sums) + R

For the mean that would be far too wide: roundings of the keys of a row partly cancel. Their sum has a standard
deviation of at most sigma = sqrt(a sum_c random_c^2 v_c^2 / 3): a third, since an error is uniform; a, the largest
number of keys of that row which round alike. The mean of |error| over N different rows exceeds the mean of sigma by 6
sigma / sqrt(N) with probability 2 exp(-18). So

    typical     F (min(E, sum_c lost_c |v_c| + sigma (1 + 6 / sqrt(N))) + logits + sums) + R

whose mean bounds the mean error, and whose root mean square that of the error. The LSE inherits `logits` and `total`,
and 4 units of log2.

With dropout, v_c is w_c v_c in all of these, w = keep / (1 - dropout); the LSE is not concerned. Rows of which no key,
or a light one, is kept have next to no error, and the mean is over the others: N is multiplied by the share of rows
that with equal errors make as steady a sum, (sum sigma)^2 / (rows sum sigma^2), for squares with sigma^2 in both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError, unknown
from flashsim.numerics.error_terms import (
    DIVIDE,
    FP32_UNIT,
    LAMBDA,
    LOG,
    Terms,
    error_terms,
    fingerprints,
    share_of_rows,
    tiny,
)
from flashsim.numerics.layout import Float, Piece, check_inputs, pieces
from flashsim.numerics.philox import SEED
from flashsim.numerics.rounding import FORMATS, Format


class Bounds(NamedTuple):
    """`o` (B, Sq, Hq, Dv) and `lse` (B, Hq, Sq) bound each error, `o_mean` and `o_rms` the mean ones over all of O."""

    o: Float
    o_mean: float
    lse: Float
    o_rms: float


class ErrorsOfO(NamedTuple):
    """What each cause adds to the error of O, (rows, Dv): the rounding of P as in the derivation, fp32, and R."""

    factor: Float
    worst: Float
    sigma: Float
    lost: Float
    fp32: Float
    stored: Float


def errors_of_o(piece: Piece, terms: Terms, form: Format) -> ErrorsOfO:
    """The derivation above for the rows of `piece`, whose O is stored in `form`; zero in rows that see no key."""
    size, p = np.abs(piece.v), piece.drop(terms.p)
    random, lost = piece.drop(terms.random), piece.drop(terms.lost)
    with np.errstate(invalid="ignore", over="ignore"):
        divided = terms.total + DIVIDE * FP32_UNIT
        f = np.exp(2 * terms.logits + terms.product + divided)
        o = np.abs(p @ piece.v)
        fp32 = np.expm1(2 * terms.logits) * (p * (1 - terms.p) @ size)
        fp32 = f * (fp32 + np.expm1(terms.product) * (p @ size) + np.expm1(divided) * o)
        worst = f * ((random + lost) @ size)
        sigma = f * np.sqrt(terms.alike * (random**2 @ piece.v**2) / 3)
        stored = np.where(terms.seen, form.unit_roundoff * (o + worst + fp32) + tiny(form), 0.0)
        return ErrorsOfO(f, worst, sigma, f * (lost @ size), fp32, stored)


def check_dtypes(**dtypes: str) -> None:
    """Raises InputError with one line for each value that is no dtype."""
    problems = [f"{name}: {unknown('dtype', given, FORMATS)}" for name, given in dtypes.items() if given not in FORMATS]
    if problems:
        raise InputError(problems)


def rounding_bounds(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    p_dtype: str | None = None,
    p_scale: float = 1.0,
    BLOCK_N: int = 16,
    accumulator: float = FP32_UNIT,
    s_dtype: str | None = None,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> Bounds:
    """The bounds derived above for a kernel with O in `dtype`; all are zero in rows that see no key.

    P is multiplied by `p_scale` and rounded to `p_dtype`, by default `dtype` as it is. `BLOCK_N` is the least number of
    keys between two rescalings; 16 is the k extent of one MMA. `accumulator` is the unit roundoff of the tensor cores'
    sums, about 2**-14 for fp8 on Hopper (DeepSeek-V3 Technical Report, section 3.3.2). `s_dtype` is the dtype of scaled
    scores that are stored, as by unfused attention. `dropout`: the kernel drops by the bits of `philox.keep`, and
    multiplies by 1 / (1 - dropout) P before it is rounded, or O. Raises InputError for arguments that do not fit.
    """
    p_dtype = dtype if p_dtype is None else p_dtype
    check_dtypes(dtype=dtype, p_dtype=p_dtype, **({"s_dtype": s_dtype} if s_dtype else {}))
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    batch, seqlen_q, heads_q, _ = inputs.q.shape
    worst = np.zeros((batch, seqlen_q, heads_q, inputs.v.shape[3]))  # E F
    sigma, lost, others = np.zeros_like(worst), np.zeros_like(worst), np.zeros_like(worst)
    lse = np.zeros((batch, heads_q, seqlen_q))
    if inputs.k.shape[1] == 0 or not worst.size:
        return Bounds(worst, 0.0, lse, 0.0)
    rows: set[int] = set()
    for piece in pieces(inputs, mask):
        at = (piece.batch, piece.rows, piece.head)
        scores = FORMATS[s_dtype] if s_dtype else None
        terms = error_terms(piece, inputs.scale, FORMATS[p_dtype], p_scale, BLOCK_N, accumulator, scores)
        rows.update(fingerprints(terms.steps[terms.seen[:, 0]]).tolist())
        errors = errors_of_o(piece, terms, FORMATS[dtype])
        worst[at], sigma[at], lost[at], others[at] = (
            errors.worst,
            errors.sigma,
            errors.lost,
            errors.fp32 + errors.stored,
        )
        bound = terms.logits + terms.total + LOG * FP32_UNIT
        lse[piece.batch, piece.head, piece.rows] = np.where(terms.seen, bound, 0.0)[:, 0]
    with np.errstate(over="ignore"):  # scores so large that their rounding leaves nothing of the result
        typical = squares = _typical(worst, sigma, lost, len(rows)) + others
        if inputs.dropout:
            typical = _typical(worst, sigma, lost, len(rows) * share_of_rows(sigma)) + others
            squares = _typical(worst, sigma, lost, len(rows) * share_of_rows(sigma**2)) + others
        return Bounds(worst + others, float(np.mean(typical)), lse, float(np.mean(squares**2)) ** 0.5)


def _typical(worst: Float, sigma: Float, lost: Float, different: float) -> Float:
    """What the mean over so many `different` rows does not exceed, of the errors that come from rounding P."""
    typical: Float = np.minimum(worst, lost + sigma * (1 + LAMBDA / max(1, different) ** 0.5))
    return typical
