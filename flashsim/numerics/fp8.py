"""FP8 attention: tensors with a scale per block, and unfused attention that rounds where an fp8 kernel does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError
from flashsim.numerics.bounds import Bounds, rounding_bounds
from flashsim.numerics.error_terms import FP32_UNIT
from flashsim.numerics.layout import Float, check_inputs, pieces
from flashsim.numerics.rounding import FORMATS, round_to, saturate

P_SCALE = 256.0
"""P <= 1 is multiplied by this power of two before it is rounded to e4m3, whose largest number is 448: FlashAttention-3
subtracts 8 from the maximum in base 2 (`hopper/softmax.h`, `Max_offset`)."""


class Blocks(NamedTuple):
    """A tensor in e4m3: `codes` (B, S, H, D) times `scales` (B, ceil(S / block), H), one for each block of rows."""

    codes: Float
    scales: Float
    block: int

    @property
    def values(self) -> Float:
        """What the codes stand for, (B, S, H, D), without error."""
        rows = np.repeat(self.scales, self.block, axis=1)[:, : self.codes.shape[1]]
        values: Float = self.codes * rows[..., None]
        return values


def quantize(x: ArrayLike, block: int | None) -> Blocks:
    """x (B, S, H, D) in e4m3 with one fp32 scale, max|x| / 448, for each block of `block` rows of a head.

    FlashAttention-3, section 3.3: block quantization. With `block` None all sequences and heads have the same scale,
    in one block of S rows each: quantization per tensor. A block of zeros, or of numbers whose scale fp32 does not
    hold, has scale 1. Raises InputError if `x` has not four dimensions or `block` is not positive.
    """
    values = np.asarray(x, dtype=np.float64)
    problems = [] if values.ndim == 4 else [f"x: must have 4 dimensions, got shape {values.shape}"]
    if block is not None and block < 1:
        problems.append(f"block: must be at least 1, got {block}")
    if problems:
        raise InputError(problems)
    batch, seqlen, heads, head_dim = values.shape
    per_tensor = block is None
    block = max(seqlen, 1) if block is None else block
    blocks = -(-seqlen // block)
    padded = np.zeros((batch, blocks * block, heads, head_dim))
    padded[:, :seqlen] = values
    tiles = padded.reshape(batch, blocks, block, heads, head_dim)
    largest = np.abs(tiles).max(axis=(2, 4), initial=0.0)
    if per_tensor:
        largest = np.full_like(largest, largest.max(initial=0.0))
    scales = round_to(largest / FORMATS["e4m3"].max, "fp32")
    scales = np.where(scales == 0, 1.0, scales)
    codes = np.empty_like(tiles)
    # A head at a time: temporaries of a whole tensor would cost more time than the arithmetic.
    for b, h in np.ndindex(batch, heads):
        codes[b, :, :, h] = round_to(saturate(tiles[b, :, :, h] / scales[b, :, h, None, None], "e4m3"), "e4m3")
    codes = codes.reshape(padded.shape)[:, :seqlen]
    return Blocks(codes, scales, block)


def emulated_attention(
    q: ArrayLike,  # (B, Sq, Hq, D)
    k: ArrayLike,  # (B, Sk, Hkv, D)
    v: ArrayLike,  # (B, Sk, Hkv, Dv)
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    p_scale: float = P_SCALE,
) -> Float:
    """o (B, Sq, Hq, Dv) in `dtype` from the values of quantized tensors, P being rounded to e4m3.

    The ruler of flash-attn's fp8 tests (`attention_ref` with `reorder_ops` and `intermediate_dtype`): S and softmax in
    fp32, exp(S - m) * p_scale rounded to e4m3, the product with V in fp32, divided by the sum of what was not rounded.
    Raises InputError for arguments that do not fit.
    """
    inputs = check_inputs(q, k, v, scale)
    o = np.zeros((*inputs.q.shape[:3], inputs.v.shape[3]))
    if inputs.k.shape[1] == 0:
        return o
    for piece in pieces(inputs, mask):
        q32, k32, v32 = (x.astype(np.float32) for x in (piece.q, piece.k, piece.v))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            s = np.where(piece.allowed, q32 @ k32.T * np.float32(inputs.scale), np.float32(-np.inf))
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(m == -np.inf, np.float32(0), m))
            total = p.sum(axis=1, keepdims=True) * np.float32(p_scale)
            p = round_to(saturate(p * np.float32(p_scale), "e4m3"), "e4m3").astype(np.float32)
            o[piece.batch, piece.rows, piece.head] = round_to(np.where(m > -np.inf, p @ v32 / total, 0), dtype)
    return o


def fp8_bounds(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    *,
    p_scale: float = P_SCALE,
    BLOCK_N: int = 32,
    accumulator: float = FP32_UNIT,
) -> Bounds:
    """`rounding_bounds` for the values of quantized tensors, O in `dtype` and P in e4m3.

    Scores and products with V are multiplied by the scales of their tiles in fp32, which the roundings counted for the
    scale of the scores and for each rescaling cover.
    """
    return rounding_bounds(
        q, k, v, dtype, mask, scale, p_dtype="e4m3", p_scale=p_scale, BLOCK_N=BLOCK_N, accumulator=accumulator
    )
