"""The rules that accept or reject computed attention. NaN is never accepted, in the result or in the reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.bounds import Bounds
from flashsim.numerics.gradient_bounds import GradientBounds
from flashsim.numerics.gradients import Gradients
from flashsim.numerics.layout import Float
from flashsim.result import Functional

EXACT = 1e-9
"""Relative tolerance of a float64 run: order of summation is the only difference, worth about 1e-15 a step."""
MAX_RATIO, GRADIENT_RATIO = 2.0, 3.0
"""The largest error of O and of a gradient may be this many times that of eager attention: flash-attn's rules."""
MEAN_RATIO = 1.5
"""The mean error may be this many times eager's: flash-attn's rule for its KV cache tests."""
LSE_TOLERANCE = 1e-5
"""FlashAttention-3's tolerance for fp32 LSE."""


class Clause(NamedTuple):
    """One condition of a rule: kept if `value` is at most `limit` and `limit` is finite."""

    what: str
    value: float
    limit: float

    @property
    def kept(self) -> bool:
        return self.value <= self.limit < np.inf


class Comparison(NamedTuple):
    """What a rule has to say about a result: every clause with its numbers."""

    clauses: tuple[Clause, ...]

    @property
    def accepted(self) -> bool:
        return all(clause.kept for clause in self.clauses)

    @property
    def broken(self) -> tuple[Clause, ...]:
        return tuple(clause for clause in self.clauses if not clause.kept)


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


def _norm(x: Float) -> float:
    return float(np.sqrt(np.sum(x * x)))


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


def gradient_errors(given: Gradients, reference: Gradients) -> dict[str, float]:
    """The largest error of each of dq, dk and dv."""
    return {name: _largest(_error(*pair)) for name, *pair in zip(Gradients._fields, given, reference, strict=True)}


def compare_gradients_exact(given: Gradients, reference: Gradients, q: Float, k: Float, v: Float, do: Float) -> bool:
    """Are the gradients of a run in float64 the reference?

    Accepted if no element is off by more than 1e-9 of what its sum is made of: dV is a sum of rows of dO with weights
    below 1; dQ and dK are sums of rows of K and Q, with weights below scale max|dO v| and as many rows as there are.
    """
    rows, depth = q.shape[1] * (q.shape[2] // k.shape[2]), v.shape[3]
    weight = 2 * depth * _largest(do) * _largest(v) * q.shape[3] ** -0.5
    sizes = (weight * _largest(k), rows * weight * _largest(q), rows * _largest(do))
    errors = gradient_errors(given, reference).values()
    return all(error <= EXACT * max(size, 1e-300) < np.inf for error, size in zip(errors, sizes, strict=True))


def _lse_accepted(lse_error: Float, tolerance: Float) -> bool:
    return lse_error.shape == tolerance.shape and bool(np.all(lse_error <= tolerance))


def _tensor_clauses(
    name: str,
    given: ArrayLike,
    reference: ArrayLike,
    eager: ArrayLike,
    bound: Float,
    mean_bound: float,
    max_ratio: float,
) -> tuple[Clause, ...]:
    """The clauses for one tensor; a single one if shapes differ."""
    error, eager_error = _error(given, reference), _error(eager, reference)
    if not error.shape == eager_error.shape == bound.shape:
        return (Clause(f"{name}: shape", np.inf, 0.0),)
    eager_error = np.where(np.isfinite(eager_error), eager_error, 0.0)
    wrong_zero = (np.asarray(given) == 0) & (np.abs(np.asarray(reference)) > bound)
    return (
        Clause(f"{name}: largest error", _largest(error), max_ratio * _largest(eager_error) + _largest(bound)),
        Clause(f"{name}: mean error", _mean(error), MEAN_RATIO * _mean(eager_error) + mean_bound),
        Clause(f"{name}: zeros where the reference is not", float(np.sum(wrong_zero)), 0.0),
    )


def _lse_clause(lse_error: Float, tolerance: Float) -> Clause:
    if lse_error.shape != tolerance.shape:
        return Clause("LSE: shape", np.inf, 0.0)
    return Clause("LSE: error / tolerance", _largest(lse_error / tolerance), 1.0)


def forward_clauses(
    o: ArrayLike,
    lse: ArrayLike,
    o_ref: ArrayLike,
    lse_ref: ArrayLike,
    o_eager: ArrayLike,
    bounds: Bounds,
) -> tuple[Clause, ...]:
    """The rule for O and LSE. o, o_ref, o_eager (B, Sq, Hq, Dv); lse, lse_ref (B, Hq, Sq).

    `o_eager` is from `eager.eager_attention`, `bounds` from `bounds.rounding_bounds`, whose derivation is there. Errors
    being against the float64 reference,

    - the largest error is at most 2 times eager's, plus the largest bound;
    - the mean error is at most 1.5 times eager's, plus the bound of the mean;
    - an element is zero only where the reference is, or is smaller than that element's bound;
    - each LSE is within 1e-5 * max(1, |LSE|) plus its bound, and -inf stands where the reference has it;
    - everything is finite where the reference is, and shapes are equal.

    The bounds are needed because eager can be exact by luck: with few keys, or with equal ones. Where eager overflows
    it is no ruler, and only the bounds count.
    """
    return (
        *_tensor_clauses("O", o, o_ref, o_eager, bounds.o, bounds.o_mean, MAX_RATIO),
        _lse_clause(_error(lse, lse_ref), LSE_TOLERANCE * _lse_scale(lse_ref) + bounds.lse),
    )


def compare_rounded(
    o: ArrayLike,
    lse: ArrayLike,
    o_ref: ArrayLike,
    lse_ref: ArrayLike,
    o_eager: ArrayLike,
    bounds: Bounds,
) -> Functional:
    """Is a low-precision result as good as that of unfused attention in the same dtype?

    Accepted if `forward_clauses` of the same arguments are all kept.
    """
    clauses = forward_clauses(o, lse, o_ref, lse_ref, o_eager, bounds)
    return _functional(_error(o, o_ref), _error(lse, lse_ref), Comparison(clauses).accepted)


def compare_gradients(given: Gradients, reference: Gradients, eager: Gradients, bounds: GradientBounds) -> Comparison:
    """Are low-precision gradients as good as those of unfused attention in the same dtype?

    The same rule as for O, with 3 times eager's largest error, for each of dq, dk and dv. `reference` and `eager` are
    from `gradients`, `bounds` from `gradient_bounds`.
    """
    return Comparison(
        tuple(
            clause
            for n, name in enumerate(Gradients._fields)
            for clause in _tensor_clauses(
                name, given[n], reference[n], eager[n], bounds.largest[n], bounds.mean[n], GRADIENT_RATIO
            )
        )
    )


def compare_fp8(
    o: ArrayLike,
    lse: ArrayLike,
    o_ref: ArrayLike,
    lse_ref: ArrayLike,
    o_twin: ArrayLike,
    bounds: Bounds,
) -> Comparison:
    """Is the result of an fp8 kernel as good as that of unfused attention which rounds where it does?

    `o_ref` and `lse_ref` are of the quantized tensors, `o_twin` is from `fp8.emulated_attention`, and `bounds` has P's
    format (`fp8.fp8_bounds`). The rule for O and LSE with the twin as eager, and against the twin itself: the L2
    distance is at most the twin's own from the reference plus the bound of the root mean square error, which follows
    from the triangle inequality. That distance relative to ||o|| being e, the cosine is at least sqrt(1 - e^2).
    """
    clauses = forward_clauses(o, lse, o_ref, lse_ref, o_twin, bounds)
    if np.shape(o) != np.shape(o_twin):
        return Comparison(clauses)
    apart, own = _error(o, o_twin), _error(o_twin, o_ref)
    limit = _norm(own) + apart.size**0.5 * bounds.o_rms
    return Comparison((*clauses, Clause("O: L2 distance from the fp8 twin", _norm(apart), limit)))
