"""Values of Q, K and V that kernels get wrong, each kind made from a problem and a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashsim.numerics.layout import Float
from flashsim.numerics.rounding import FORMATS, round_to
from flashsim.problem import AttentionProblem

Tensors = tuple[Float, Float, Float]
"""q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv)."""
Kind = Callable[[np.random.Generator, AttentionProblem], Tensors]


def make_inputs(problem: AttentionProblem, kind: str, seed: int) -> Tensors:
    """q, k, v of that kind: float64 arrays of values that the problem's dtype holds exactly.

    The same arguments give the same arrays on every machine (NumPy's PCG64). Raises KeyError for an unknown kind.
    """
    q, k, v = (round_to(x, problem.output_dtype) for x in _KINDS[kind](np.random.default_rng(seed), problem))
    return q, k, v


def _normal(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    return (
        rng.standard_normal((problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim)),
        rng.standard_normal((problem.batch, problem.seqlen_k, problem.heads_kv, problem.head_dim)),
        rng.standard_normal((problem.batch, problem.seqlen_k, problem.heads_kv, problem.head_dim_v)),
    )


def _signs(rng: np.random.Generator, problem: AttentionProblem) -> Float:
    """A direction in which scores can be set: entries -1 and 1, (D,)."""
    return rng.choice((-1.0, 1.0), size=problem.head_dim)


def _scaled(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    q, k, v = _normal(rng, problem)
    return 3 * q, 3 * k, 3 * v


def _overflow(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """As flash-attn's overflow test: the softmax is sharp, and gradients leave fp16."""
    q, k, v = _normal(rng, problem)
    return 5 * q, 3 * k, 3 * v


def _huge_scores(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """All dot products beyond fp16's largest value, positive and negative, before the softmax scale; no input is."""
    q, k, v = _normal(rng, problem)
    u = _signs(rng, problem)
    amplitude = (4 * FORMATS["fp16"].max / problem.head_dim) ** 0.5
    sides = rng.choice((-1.0, 1.0), size=(problem.batch, problem.seqlen_q, problem.heads_q, 1))
    return amplitude * (sides * u + q / 8), amplitude * (u + k / 8), v


def _ones(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """All scores are equal: O is the mean of the values that a row sees."""
    q, k, v = _normal(rng, problem)
    return np.ones_like(q), np.ones_like(k), v


def _constant(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """O is that of V, and rounding errors all go the same way."""
    q, k, v = (np.full_like(x, rng.standard_normal()) for x in _normal(rng, problem))
    return q, k, v


def _zeros(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    q, k, v = (np.zeros_like(x) for x in _normal(rng, problem))
    return q, k, v


def _outliers(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """One entry in two hundred is a hundred times as large, at least one of each tensor."""
    tensors = _normal(rng, problem)
    for x in tensors:
        x.reshape(-1)[rng.choice(x.size, size=-(-x.size // 200), replace=False)] *= 100
    return tensors


def _ramp(rng: np.random.Generator, problem: AttentionProblem, sign: float) -> Tensors:
    """Scores f_i * r_c with 0.5 <= f_i <= 1.5: r rises (or falls) evenly from key to key, over a range of 4 to 40."""
    _, _, v = _normal(rng, problem)
    u = _signs(rng, problem)
    factor = rng.uniform(0.5, 1.5, size=(problem.batch, problem.seqlen_q, problem.heads_q, 1))
    reach = rng.uniform(4, 40, size=(problem.batch, 1, problem.heads_kv, 1))
    ramp = sign * reach * np.linspace(-0.5, 0.5, problem.seqlen_k)[:, None, None]
    return factor * u, ramp / problem.head_dim**0.5 * u, v


def _rising(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """Every KV tile, first to last, changes the maximum of every row; last to first, only the first one does."""
    return _ramp(rng, problem, 1.0)


def _falling(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """Every KV tile, last to first, changes the maximum of every row; first to last, only the first one does."""
    return _ramp(rng, problem, -1.0)


def _negative_rows(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """All scores of every other row are near -150, whose exp is 0 in fp32: a maximum that starts at 0 stays there."""
    q, k, v = _normal(rng, problem)
    u = _signs(rng, problem)
    q[:, ::2] = -150 / problem.head_dim**0.5 * u
    return q, u + 0.1 * k, v


def _dominant_key(rng: np.random.Generator, problem: AttentionProblem) -> Tensors:
    """In each batch and KV head one key takes nearly all of every row that sees it: O is that key's value."""
    q, k, v = _normal(rng, problem)
    u = _signs(rng, problem)
    for b, h in np.ndindex(problem.batch, problem.heads_kv):
        k[b, rng.integers(problem.seqlen_k), h] = 8 * u
    return 0.5 * u + 0.25 * q, k, v


_KINDS: dict[str, Kind] = {
    "normal": _normal,
    "scaled": _scaled,
    "overflow": _overflow,
    "huge_scores": _huge_scores,
    "ones": _ones,
    "constant": _constant,
    "zeros": _zeros,
    "outliers": _outliers,
    "rising": _rising,
    "falling": _falling,
    "negative_rows": _negative_rows,
    "dominant_key": _dominant_key,
}
KINDS = tuple(_KINDS)
"""Names of the kinds of values; the first is what a failure shrinks to."""
