"""Attention as a framework computes it without fusion, in the problem's own dtype: the ruler for kernels' errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flashsim.numerics.layout import Float, check_inputs, pieces
from flashsim.numerics.philox import SEED
from flashsim.numerics.rounding import round_to


def eager_attention(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    dropout: float = 0.0,
    dropout_seed: int = SEED,
) -> Float:
    """o (B, Sq, Hq, Dv), rounded where unfused PyTorch rounds when its tensors are `dtype` (fp16 or bf16).

    S = scale * Q K^T is accumulated and scaled in fp32 and rounded to `dtype` once (`torch.baddbmm(alpha=scale)`);
    softmax is fp32 inside and rounds the normalized P to `dtype`; P V is accumulated in fp32 and rounded. A row that
    sees no key gives 0. Where S overflows `dtype` the result is NaN, as it is there. Dropout, with the bits of
    `philox.keep`, multiplies P by 1 / (1 - dropout) in fp32 and rounds it again (`torch.nn.functional.dropout`). Raises
    InputError for arguments that do not fit.
    """
    inputs = check_inputs(q, k, v, scale, dropout, dropout_seed)
    batch, seqlen_q, heads_q, _ = inputs.q.shape
    o = np.zeros((batch, seqlen_q, heads_q, inputs.v.shape[3]))
    if inputs.k.shape[1] == 0:
        return o
    for piece in pieces(inputs, mask):
        q32, k32, v32 = (x.astype(np.float32) for x in (piece.q, piece.k, piece.v))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            s = round_to(q32 @ k32.T * np.float32(inputs.scale), dtype).astype(np.float32)
            s = np.where(piece.allowed, s, np.float32(-np.inf))
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(m == -np.inf, np.float32(0), m))
            p = round_to(p / p.sum(axis=1, keepdims=True), dtype).astype(np.float32)
            if piece.kept is not None:
                p = round_to(piece.drop(p), dtype).astype(np.float32)
            seen = np.any(piece.allowed, axis=1, keepdims=True)
            o[piece.batch, piece.rows, piece.head] = round_to(np.where(seen, p @ v32, 0), dtype)
    return o
