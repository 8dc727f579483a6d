"""Gradients of attention: in float64, the truth, and as a framework computes them without fusion, the ruler."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError
from flashsim.numerics.layout import Float, Inputs, check_inputs, pieces
from flashsim.numerics.philox import SEED
from flashsim.numerics.rounding import round_to


class Gradients(NamedTuple):
    """dq (B, Sq, Hq, D), dk (B, Sk, Hkv, D) and dv (B, Sk, Hkv, Dv)."""

    dq: Float
    dk: Float
    dv: Float


def check_do(do: ArrayLike, inputs: Inputs) -> Float:
    """dO as float64. Raises InputError unless it has the shape of O, (B, Sq, Hq, Dv)."""
    array, expected = np.asarray(do, dtype=np.float64), (*inputs.q.shape[:3], inputs.v.shape[3])
    if array.shape != expected:
        raise InputError(f"do: must have the shape of o, {expected}, got {array.shape}")
    return array


def sum_groups(x: Float, heads_kv: int) -> Float:
    """(B, S, Hq, D) summed over the query heads that share a KV head: (B, S, Hkv, D)."""
    batch, seqlen, heads_q, head_dim = x.shape
    total: Float = x.reshape(batch, seqlen, heads_kv, heads_q // heads_kv, head_dim).sum(axis=3)
    return total


def attention_gradients_reference(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    do: ArrayLike,  # (B, Sq, Hq, Dv)
    mask: str = "full",
    scale: float | None = None,
    *,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> Gradients:
    """Gradients of sum(O * dO) in q, k and v, in float64; dk and dv are summed over the query heads of a KV head.

    dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale * dS K, dK = scale * dS^T Q. Rows that see no key have
    dq = 0 and add nothing to dk and dv. With dropout, w = keep / (1 - dropout) with the bits of the forward pass:
    dV = (P * w)^T dO and dP = (dO V^T) * w, of which rowsum(P * dP) = rowsum(dO * O); dS = P * (dP - that), whole P.
    Raises InputError, one line per argument that does not fit.
    """
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    given = check_do(do, inputs)
    batch, _, heads_q, head_dim = inputs.q.shape
    seqlen_k, heads_kv, head_dim_v = inputs.v.shape[1:]
    dq = np.zeros_like(inputs.q)
    dk, dv = (np.zeros((batch, seqlen_k, heads_q, width)) for width in (head_dim, head_dim_v))
    if seqlen_k == 0:
        return Gradients(dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv))
    for piece in pieces(inputs, mask):
        at, head = (piece.batch, piece.rows, piece.head), (piece.batch, slice(None), piece.head)
        with np.errstate(invalid="ignore", over="ignore"):
            s = np.where(piece.allowed, piece.q @ piece.k.T * inputs.scale, -np.inf)
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(m == -np.inf, 0.0, m))
            p = p / np.where(m == -np.inf, 1.0, p.sum(axis=1, keepdims=True))
            dp = piece.drop(given[at] @ piece.v.T)
            ds = p * (dp - np.sum(p * dp, axis=1, keepdims=True))
            dq[at] = ds @ piece.k * inputs.scale
            dk[head] += ds.T @ piece.q * inputs.scale
            dv[head] += piece.drop(p).T @ given[at]
    return Gradients(dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv))


def eager_gradients(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    do: ArrayLike,  # (B, Sq, Hq, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> Gradients:
    """The same, rounded where the backward pass of unfused PyTorch rounds when its tensors are `dtype`.

    S and P are those of `eager.eager_attention`; dP and dS are stored in `dtype`, softmax's backward pass is fp32
    inside, and every product is accumulated in fp32 and rounded once. Keys and values that several query heads share
    are repeated for them, so each head's dk and dv is rounded, and their sum again. With dropout, P * w and dP * w are
    stored in `dtype` beside P and dP.
    """
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    given = check_do(do, inputs)
    batch, _, heads_q, head_dim = inputs.q.shape
    seqlen_k, heads_kv, head_dim_v = inputs.v.shape[1:]
    dq = np.zeros_like(inputs.q)
    dk, dv = (np.zeros((batch, seqlen_k, heads_q, width)) for width in (head_dim, head_dim_v))
    if seqlen_k == 0:
        return Gradients(dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv))

    def rounded(x: ArrayLike) -> np.typing.NDArray[np.float32]:
        return round_to(x, dtype).astype(np.float32)

    factor = np.float32(inputs.scale)
    for piece in pieces(inputs, mask):
        at, head = (piece.batch, piece.rows, piece.head), (piece.batch, slice(None), piece.head)
        q32, k32, v32, do32 = (x.astype(np.float32) for x in (piece.q, piece.k, piece.v, given[at]))
        with np.errstate(invalid="ignore", over="ignore"):
            s = np.where(piece.allowed, rounded(q32 @ k32.T * factor), np.float32(-np.inf))
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(m == -np.inf, np.float32(0), m))
            p = rounded(p / np.where(m == -np.inf, np.float32(1), p.sum(axis=1, keepdims=True)))
            dp, dropped = rounded(do32 @ v32.T), p
            if piece.kept is not None:
                dp, dropped = rounded(piece.drop(dp)), rounded(piece.drop(p))
            ds = rounded(p * (dp - np.sum(p * dp, axis=1, keepdims=True)))
            dq[at] = round_to(ds @ k32 * factor, dtype)
            dk[head] += ds.T @ q32 * factor
            dv[head] += dropped.T @ do32
    dk, dv = (round_to(sum_groups(round_to(x, dtype), heads_kv), dtype) for x in (dk, dv))
    return Gradients(dq, dk, dv)
