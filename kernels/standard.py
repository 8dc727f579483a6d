"""Standard attention, what FlashAttention replaced: S and P go through memory between three kernels.

Algorithm 0 of the FlashAttention paper (arXiv 2205.14135):

    1  S = scale * Q K^T, written to memory
    2  P = softmax(S), row by row, written to memory
    3  O = P V

S and P are (batch, heads, seqlen_q, seqlen_k) in the dtype of the inputs, as a framework stores them: that is the
point. Query heads that share a KV head read it where it is; frameworks repeat it for them first.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import check_attention, check_tensors, launch_arguments, padded, sides
from flashsim_kernels.fa2_backward import register_gradients

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
ROW_STEP = 16
"""Rows of S and P begin at multiples of so many elements, so that they can be read 16 bytes at a time."""
MOST_ROWS = 64
"""That a program of the softmax has, however short they are."""


@triton.jit
def standard_scores(
    Q, K, S,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_s,
    seqlen_q, seqlen_k, heads, group,
    scale,
    D: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1: S = scale * Q K^T, -inf where masked. One program for each BLOCK_M x BLOCK_N tile of each head."""
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    start_m, start_n = tl.program_id(0) // tiles_n * BLOCK_M, tl.program_id(0) % tiles_n * BLOCK_N
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Only what lies inside a tile is 32 bits wide: tensors may have more than 2^31 elements.
    Q += b * stride_qb + h.to(tl.int64) * stride_qh + start_m.to(tl.int64) * stride_qs
    K += b * stride_kb + (h // group).to(tl.int64) * stride_kh + start_n.to(tl.int64) * stride_ks
    S += ((b * heads + h) * seqlen_q + start_m) * stride_s + start_n
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_row, is_key = start_m + m < seqlen_q, start_n + n < seqlen_k

    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        is_d = start + d < D
        q = tl.load(Q + m[:, None] * stride_qs + (start + d)[None, :], mask=is_row[:, None] & is_d[None, :], other=0.0)
        k = tl.load(K + n[:, None] * stride_ks + (start + d)[None, :], mask=is_key[:, None] & is_d[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    s = s * scale  # before it is rounded: the products themselves may leave fp16
    if CAUSAL:
        s = tl.where((start_n + n)[None, :] <= (start_m + m)[:, None] + (seqlen_k - seqlen_q), s, float("-inf"))
    at = m[:, None] * stride_s + n[None, :]
    tl.store(S + at, s.to(S.dtype.element_ty), mask=is_row[:, None] & is_key[None, :])


@triton.jit
def standard_softmax(
    S, P, LSE,
    stride_s,
    num_rows, seqlen_q, seqlen_k,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """2: P = softmax(S) and LSE of BLOCK_M rows, which are (batch, head, query).

    A row is read twice, BLOCK_N scores at a time: for its maximum and sum (the online normalizer, arXiv 1805.02867),
    and for P, when it comes from a cache.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    at = rows[:, None] * stride_s + keys[None, :]
    is_row = rows < num_rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, seqlen_k, BLOCK_N):
        is_score = is_row[:, None] & (start + keys < seqlen_k)[None, :]
        s = tl.load(S + at + start, mask=is_score, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        l = l * tl.exp2((m - shift) * LOG2E) + tl.sum(p, 1)
        m = m_new

    shift = tl.where(m == float("-inf"), 0.0, m)
    divisor = l
    if CAUSAL:
        # l is 0 in a row without keys, which has P = 0; and in one whose scores have all overflowed, which has P = NaN.
        divisor = tl.where(rows % seqlen_q + (seqlen_k - seqlen_q) < 0, 1.0, l)
    for start in range(0, seqlen_k, BLOCK_N):
        is_score = is_row[:, None] & (start + keys < seqlen_k)[None, :]
        s = tl.load(S + at + start, mask=is_score, other=float("-inf")).to(tl.float32)
        p = tl.exp2((s - shift[:, None]) * LOG2E) / divisor[:, None]
        tl.store(P + at + start, p.to(P.dtype.element_ty), mask=is_score)
    tl.store(LSE + rows, m + tl.log2(l) * LN2, mask=is_row)


@triton.jit
def standard_output(
    P, V, O,
    stride_s,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, heads, group,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """3: O = P V. One program for each BLOCK_M x BLOCK_N tile of each head, a loop over BLOCK_K keys at a time."""
    tiles_n: tl.constexpr = tl.cdiv(D_V, BLOCK_N)
    start_m, start_n = tl.program_id(0) // tiles_n * BLOCK_M, tl.program_id(0) % tiles_n * BLOCK_N
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    P += ((b * heads + h) * seqlen_q + start_m) * stride_s
    V += b * stride_vb + (h // group).to(tl.int64) * stride_vh
    O += b * stride_ob + h.to(tl.int64) * stride_oh + start_m.to(tl.int64) * stride_os
    m, n, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), start_n + tl.arange(0, BLOCK_N)
    is_row, is_column = start_m + m < seqlen_q, columns < D_V

    o = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, seqlen_k, BLOCK_K):
        is_key = start + n < seqlen_k
        V_j = V + tl.cast(start, tl.int64) * stride_vs
        p = tl.load(P + m[:, None] * stride_s + (start + n)[None, :], mask=is_row[:, None] & is_key[None, :], other=0.0)
        at = n[:, None] * stride_vs + columns[None, :]
        v = tl.load(V_j + at, mask=is_key[:, None] & is_column[None, :], other=0.0)
        o = tl.dot(p, v, o, input_precision="ieee")
    at = m[:, None] * stride_os + columns[None, :]
    tl.store(O + at, o.to(O.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def standard_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    SCORES: int | None = None,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches."""
    check_attention("standard", q, k, v, scale=scale)
    scores = launch_arguments("standard", "standard_scores", q, v, overrides)
    softmax = launch_arguments("standard", "standard_softmax", q, v, {"SCORES": SCORES})
    output = launch_arguments("standard", "standard_output", q, v, overrides)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    group = heads // heads_kv
    row = triton.cdiv(seqlen_k, ROW_STEP) * ROW_STEP
    s, p = (torch.empty(batch, heads, seqlen_q, row, dtype=q.dtype, device=q.device) for _ in range(2))
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return o, lse
    scores["BLOCK_K"] = min(scores["BLOCK_K"], padded(d))
    output["BLOCK_N"] = min(output["BLOCK_N"], padded(d_v))
    elements = softmax.pop("SCORES")
    softmax["BLOCK_N"] = min(elements, triton.next_power_of_2(max(1, seqlen_k)))
    softmax["BLOCK_M"] = min(elements // softmax["BLOCK_N"], MOST_ROWS)
    with torch.cuda.device_of(q):
        if seqlen_k:
            tiles = triton.cdiv(seqlen_q, scores["BLOCK_M"]) * triton.cdiv(seqlen_k, scores["BLOCK_N"])
            standard_scores[(tiles, heads, batch)](
                q, k, s,
                *q.stride()[:3], *k.stride()[:3], row,
                seqlen_q, seqlen_k, heads, group,
                d**-0.5 if scale is None else scale,
                D=d, CAUSAL=causal, **scores,
            )  # fmt: skip
        standard_softmax[(triton.cdiv(lse.numel(), softmax["BLOCK_M"]),)](
            s, p, lse, row, lse.numel(), seqlen_q, seqlen_k, CAUSAL=causal, **softmax
        )
        tiles = triton.cdiv(seqlen_q, output["BLOCK_M"]) * triton.cdiv(d_v, output["BLOCK_N"])
        standard_output[(tiles, heads, batch)](
            p, v, o,
            row, *v.stride()[:3], *o.stride()[:3],
            seqlen_q, seqlen_k, heads, group,
            D_V=d_v, **output,
        )  # fmt: skip
    return o, lse


@torch.library.custom_op("flashsim_kernels::standard", mutates_args=())
def standard_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    BLOCK_K: int | None,
    SCORES: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return standard_forward(
        q, k, v, right == 0, scale,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, SCORES=SCORES, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@standard_op.register_fake
def _(q, k, v, *_):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(standard_op)


def standard(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    BLOCK_K: int | None = None,
    SCORES: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V, and with `return_lse` the logarithm of the sum of exponentials of each row.

    q: (batch, seqlen_q, heads, head_dim), fp16, bf16 or fp32; k: (batch, seqlen_k, heads_kv, head_dim), v: (batch,
    seqlen_k, heads_kv, head_dim_v), of the same dtype. heads_kv divides heads: query head h reads KV head
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. Strides: any, but 1 along head_dim.

    causal: row i sees key c if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    scale: by default head_dim ** -0.5.
    deterministic: of the gradients, see `fa2_backward`.
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages: of both products, in place of what the launch table has for the
        GPU, dtype and head dim. SCORES: scores that a program of the softmax holds at a time.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    S is stored in the inputs' dtype, and LSE is as exact as that is. In fp16, scaled scores beyond 65504 overflow: a
    row with +inf, or with nothing but -inf, becomes NaN, as in a framework. S and P take memory for 2 * batch * heads *
    seqlen_q * seqlen_k elements.

    fp32 products are exact fp32 (no TF32). Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("standard", q=q, k=k, v=v)
    left, right = sides("standard", causal, None)
    o, lse = standard_op(
        q, k, v, left, right, scale, deterministic, BLOCK_M, BLOCK_N, BLOCK_K, SCORES, num_warps, num_stages
    )
    return (o, lse) if return_lse else o
