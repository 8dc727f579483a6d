"""Float64 naive attention: the truth that every other result is held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.layout import Float, check_inputs, pieces
from flashsim.numerics.philox import SEED


def attention_reference(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    mask: str = "full",
    scale: float | None = None,
    *,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> tuple[Float, Float]:
    """O = P V with P = softmax(scale * Q K^T), and the LSE (natural logarithm) of the scaled scores, head by head.

    Returns o (B, Sq, Hq, Dv) and lse (B, Hq, Sq), the layout in which flash-attn returns its softmax_lse.
    A row that sees no key, and every row if Sk = 0, gives o = 0 and lse = -inf. `scale` defaults to 1 / sqrt(D).
    NaN in a key that a row does not see has no effect on that row; NaN in a value reaches all rows of its head, since
    0 * NaN is NaN in every kernel, too. With dropout, O = (P * keep / (1 - dropout)) V with the bits of `philox.keep`,
    and P and the LSE are those of all visible keys. Raises InputError, one line per argument that does not fit.
    """
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    batch, seqlen_q, heads_q, _ = inputs.q.shape
    o = np.zeros((batch, seqlen_q, heads_q, inputs.v.shape[3]))
    lse = np.full((batch, heads_q, seqlen_q), -np.inf)
    if inputs.k.shape[1] == 0:
        return o, lse
    for piece in pieces(inputs, mask):
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            s = np.where(piece.allowed, piece.q @ piece.k.T * inputs.scale, -np.inf)
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(m == -np.inf, 0.0, m))
            total = p.sum(axis=1, keepdims=True)
            seen = np.any(piece.allowed, axis=1, keepdims=True)
            o[piece.batch, piece.rows, piece.head] = np.where(seen, piece.drop(p) @ piece.v / total, 0.0)
            lse[piece.batch, piece.head, piece.rows] = np.where(seen, m + np.log(total), -np.inf)[:, 0]
    return o, lse
