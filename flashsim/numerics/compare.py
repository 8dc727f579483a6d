"""The rules that accept or reject a computed (O, LSE). NaN is never accepted, in the result or in the reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.bounds import Bounds
from flashsim.numerics.layout import Float
from flashsim.result import Functional

EXACT = 1e-9
"""Relative tolerance of a float64 run: order of summation is the only difference, worth about 1e-15 a step."""
MAX_RATIO = 2.0
MEAN_RATIO = 1.5
"""The largest and the mean error may be this many times those of eager attention: flash-attn's rule for outputs."""
LSE_TOLERANCE = 1e-5
"""FlashAttention-3's tolerance for fp32 LSE."""


def _error(given: ArrayLike, reference: ArrayLike) -> Float:
    """|given - reference|; 0 where equal, infinities included; inf where NaN or an infinity makes it meaningless.

    One infinite element if the shapes differ.
    """
    x, ref = np.asarray(given, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape != ref.shape:
        return np.array([np.inf])
    with np.errstate(invalid="ignore", over="ignore"):
        error: Float = np.where(x == ref, 0.0, np.abs(x - ref))
    return np.where(np.isnan(error), np.inf, error)


def _largest(x: ArrayLike) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _mean(x: Float) -> float:
    return float(np.mean(x)) if x.size else 0.0


def _functional(o_error: Float, lse_error: Float, accepted: bool) -> Functional:
    return Functional(_largest(o_error), _mean(o_error), _largest(lse_error), accepted)


def _lse_scale(lse_ref: ArrayLike) -> Float:
    """max(1, |LSE|), and 1 where the LSE is infinite."""
    size = np.abs(np.asarray(lse_ref, dtype=np.float64))
    return np.where(np.isfinite(size), np.maximum(1.0, size), 1.0)


def compare_exact(
    o: ArrayLike, lse: ArrayLike, o_ref: ArrayLike, lse_ref: ArrayLike, v: ArrayLike | None = None
) -> Functional:
    """Is a run in float64 the reference? o, o_ref (B, Sq, Hq, Dv); lse, lse_ref (B, Hq, Sq); v (B, Sk, Hkv, Dv).

    Accepted if no element of O is off by more than 1e-9 * max|v|, of which O is a mean (without `v`:
    1e-9 * max(1, max|o_ref|), which cannot tell values below 1e-9 from zero), no LSE by more than
    1e-9 * max(1, |LSE|), and -inf stands where the reference has it. Errors are inf where they have no value, as with
    NaN or shapes that differ.
    """
    o_error, lse_error = _error(o, o_ref), _error(lse, lse_ref)
    scale = max(1.0, _largest(o_ref)) if v is None else _largest(v)
    accepted = _largest(o_error) <= EXACT * scale < np.inf
    if accepted:
        accepted = _lse_accepted(lse_error, EXACT * _lse_scale(lse_ref))
    return _functional(o_error, lse_error, accepted)


def _lse_accepted(lse_error: Float, tolerance: Float) -> bool:
    return lse_error.shape == tolerance.shape and bool(np.all(lse_error <= tolerance))


def compare_rounded(
    o: ArrayLike,
    lse: ArrayLike,
    o_ref: ArrayLike,
    lse_ref: ArrayLike,
    o_eager: ArrayLike,
    bounds: Bounds,
) -> Functional:
    """Is a low-precision result as good as that of unfused attention in the same dtype?

    o, o_ref, o_eager (B, Sq, Hq, Dv); lse, lse_ref (B, Hq, Sq); `o_eager` from `eager.eager_attention`, `bounds` from
    `bounds.rounding_bounds`, whose derivation is there. Accepted if, errors being against the float64 reference,

    - the largest error is at most 2 times eager's, plus the largest bound;
    - the mean error is at most 1.5 times eager's, plus the bound of the mean;
    - an element is zero only where the reference is, or is smaller than that element's bound;
    - each LSE is within 1e-5 * max(1, |LSE|) plus its bound, and -inf stands where the reference has it;
    - everything is finite where the reference is, and shapes are equal.

    The bounds are needed because eager can be exact by luck: with few keys, or with equal ones. Where eager overflows
    it is no ruler, and only the bounds count.
    """
    o_error, lse_error, eager_error = _error(o, o_ref), _error(lse, lse_ref), _error(o_eager, o_ref)
    if not o_error.shape == eager_error.shape == bounds.o.shape:
        return _functional(o_error, lse_error, accepted=False)
    eager_error = np.where(np.isfinite(eager_error), eager_error, 0.0)
    wrong_zero = (np.asarray(o) == 0) & (np.abs(np.asarray(o_ref)) > bounds.o)
    accepted = (
        _largest(o_error) <= MAX_RATIO * _largest(eager_error) + _largest(bounds.o) < np.inf
        and _mean(o_error) <= MEAN_RATIO * _mean(eager_error) + bounds.o_mean
        and not np.any(wrong_zero)
        and lse_error.shape == bounds.lse.shape
        and _lse_accepted(lse_error, LSE_TOLERANCE * _lse_scale(lse_ref) + bounds.lse)
    )
    return _functional(o_error, lse_error, accepted)
