"""The merge of two partial softmaxes: what online softmax, split-KV decode and any other cut through the keys rest on.

After some of a row's keys, with scores s_c and values v_c, its state is

    m = max_c s_c        l = sum_c exp(s_c - m)        o = sum_c exp(s_c - m) v_c

and `merge` gives the state after the keys of two states together: the operator of "Online normalizer calculation for
softmax" (Milakov and Gimelshein, arXiv 1805.02867, section 3.1), with o carried along as in FlashAttention-2 (arXiv
2307.08691, section 2.3). It is associative and commutative, and (-inf, 0, 0) is neutral, so the keys may be cut into
blocks anywhere and taken in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.layout import Float


class State(NamedTuple):
    """m and l (..., rows, 1), o (..., rows, Dv), not normalized. A row that saw no key yet has m = -inf, l = o = 0."""

    m: Float
    l: Float  # noqa: E741 - the papers' name
    o: Float


def shifted_exp(x: Float, m: Float, scale: float = 1.0) -> Float:
    """exp(scale (x - m)), where x <= m; 0 where both are -inf, as the kernels guard it. `scale` is positive.

    Of scores and their maximum it makes P~; of an older maximum and the newer one, what l and o are rescaled by.
    """
    # The distance of two finite numbers may overflow, to -inf, whose exponential is right.
    with np.errstate(over="ignore"):
        distance = scale * (x - np.where(np.isneginf(m), 0.0, m))
    weight: Float = np.exp(distance)
    return weight


def block_state(scores: ArrayLike, values: ArrayLike) -> State:
    """The state after one block: scores (..., rows, keys), scaled, -inf where masked, and values (..., keys, Dv).

    There may be no keys. A value that is not finite spoils the o of every row: 0 times it, for a masked key, is NaN.
    """
    s, v = np.asarray(scores, dtype=np.float64), np.asarray(values, dtype=np.float64)
    m: Float = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = shifted_exp(s, m)
    return State(m, p.sum(axis=-1, keepdims=True), p @ v)


def merge(a: State, b: State) -> State:
    """The state after the keys of both, which have no key in common. m is finite or -inf."""
    m: Float = np.maximum(a.m, b.m)
    alpha, beta = shifted_exp(a.m, m), shifted_exp(b.m, m)
    return State(m, alpha * a.l + beta * b.l, alpha * a.o + beta * b.o)


def normalize(o: Float, l: Float) -> Float:  # noqa: E741
    """o / l, and 0 where l is 0: the row saw no key."""
    return np.where(l == 0, 0.0, o / np.where(l == 0, 1.0, l))


def log_sum_exp(m: Float, l: Float, scale: float = 1.0) -> Float:  # noqa: E741
    """The LSE, scale m + log l, natural logarithm; -inf where l is 0: the row saw no key."""
    seen = l != 0
    return np.where(seen, scale * np.where(seen, m, 0.0) + np.log(np.where(seen, l, 1.0)), -np.inf)


def finish(state: State) -> tuple[Float, Float]:
    """O = o / l (..., rows, Dv) and the LSE (..., rows, 1); 0 and -inf in rows that saw no key."""
    return normalize(state.o, state.l), log_sum_exp(state.m, state.l)


def merge_normalized(o_a: Float, lse_a: Float, o_b: Float, lse_b: Float) -> tuple[Float, Float]:
    """O and LSE after the keys of two finished parts: o (..., rows, Dv), lse (..., rows, 1), as `finish` gives them.

    A part with LSE = -inf saw no key, and its o is not read. An LSE keeps m + log l in one number: its rounding
    changes the weight of a part by up to |LSE| 2^-53, which is nothing as long as scores are not astronomical.
    """

    def reopened(o: Float, lse: Float) -> State:
        return State(lse, np.ones_like(lse), np.where(np.isneginf(lse), 0.0, o))

    return finish(merge(reopened(o_a, lse_a), reopened(o_b, lse_b)))
