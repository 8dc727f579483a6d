"""FlashAttention-1, forward (Dao et al., arXiv 2205.14135, algorithm 1): O and its statistics go through memory.

The outer loop runs over blocks of keys, the inner one over blocks of queries, so that O_i, l_i and m_i are read and
written at every step, and one program computes all of a head. FlashAttention-2 turned the loops around; gradients are
those of `fa2_backward`, which needs O and LSE only.

O_i is normalized at every step, as in line 12, and kept in fp32 until it is complete, as the published code keeps it
(O_tmp of csrc/flash_attn/fmha_api.cpp, 2022): in 16 bits it would be rounded once for each block of keys.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import check_attention, check_tensors, launch_arguments, padded, sides
from flashsim_kernels.fa2_backward import register_gradients

LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634


@triton.jit
def load_rows(
    X, first, end, stride, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr
):
    """Rows `first` to `first` + BLOCK of X, COLUMNS elements each; 0 beyond row `end` (if CHECK) and in the padding."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    # Only what lies inside a tile is 32 bits wide: tensors may have more than 2^31 elements.
    at = X + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK and PADDED > COLUMNS:
        return tl.load(at, mask=(first + rows < end)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    if CHECK:
        return tl.load(at, mask=(first + rows < end)[:, None], other=0.0)
    if PADDED > COLUMNS:
        return tl.load(at, mask=(columns < COLUMNS)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def fa1_fwd(
    Q, K, V, O, L, M,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, heads, group,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Lines 5 to 15 for one head. qk_scale is log2(e) times the scale, and so is M, for exp2. As in the published code,
    every score is asked whether it exists."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    V += b * stride_vb + (h // group).to(tl.int64) * stride_vh
    O += b * stride_ob + h.to(tl.int64) * stride_oh
    L += (b * heads + h) * seqlen_q
    M += (b * heads + h) * seqlen_q
    columns = tl.arange(0, BLOCK_DV)

    for j in range(0, seqlen_k, BLOCK_N):  # 5
        keys = j + tl.arange(0, BLOCK_N)
        k = load_rows(K, j, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D, True)  # 6
        v = load_rows(V, j, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV, True)
        first = 0
        if CAUSAL:  # the queries before it see none of these keys
            first = tl.maximum(j + seqlen_q - seqlen_k, 0) // BLOCK_M * BLOCK_M
        for i in range(first, seqlen_q, BLOCK_M):  # 7
            rows = i + tl.arange(0, BLOCK_M)
            is_row = rows < seqlen_q
            is_o = is_row[:, None] & (columns < D_V)[None, :]
            O_i = O + tl.cast(i, tl.int64) * stride_os + (rows - i)[:, None] * stride_os + columns[None, :]
            q = load_rows(Q, i, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D, True)  # 8
            o_i = tl.load(O_i, mask=is_o, other=0.0)
            l_i = tl.load(L + rows, mask=is_row, other=0.0)
            m_i = tl.load(M + rows, mask=is_row, other=float("-inf"))
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # 9
            seen = (keys < seqlen_k)[None, :]
            if CAUSAL:
                seen = seen & (keys[None, :] <= rows[:, None] + (seqlen_k - seqlen_q))
            s = tl.where(seen, s, float("-inf"))
            m_ij = tl.max(s, 1)  # 10
            shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # of a row that sees none of these keys
            p = tl.exp2(s - shift[:, None])
            l_ij = tl.sum(p, 1)
            m_new = tl.maximum(m_i, m_ij)  # 11
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that has seen no key yet
            alpha, beta = tl.exp2(m_i - shift), tl.exp2(m_ij - shift)
            l_new = alpha * l_i + beta * l_ij
            pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            o_i = (alpha * l_i)[:, None] * o_i + beta[:, None] * pv  # 12
            o_i = o_i / tl.where(l_new == 0.0, 1.0, l_new)[:, None]
            tl.debug_barrier()  # several threads may hold l_i and m_i of a row: all have read them before one writes
            tl.store(O_i, o_i, mask=is_o)
            tl.store(L + rows, l_new, mask=is_row)  # 13
            tl.store(M + rows, m_new, mask=is_row)
        # The next block of keys reads what this one wrote, each thread perhaps what another did: Triton gives loads and
        # stores layouts of their own, and knows of no order between them. Within the inner loop no address comes twice.
        tl.debug_barrier()


def fa1_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches."""
    check_attention("fa1", q, k, v, scale=scale)
    launch = launch_arguments("fa1", "fa1_fwd", q, v, overrides)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.zeros(batch, seqlen_q, heads, d_v, dtype=torch.float32, device=q.device)  # 2
    l = torch.zeros(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    m = torch.full_like(l, float("-inf"))
    if batch and seqlen_q:
        with torch.cuda.device_of(q):
            fa1_fwd[(heads, batch)](
                q, k, v, o, l, m,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
                seqlen_q, seqlen_k, heads, heads // heads_kv,
                (d**-0.5 if scale is None else scale) * LOG2E,
                D=d, D_V=d_v, BLOCK_D=padded(d), BLOCK_DV=padded(d_v), CAUSAL=causal,
                **launch,
            )  # fmt: skip
    return o.to(q.dtype), (m + torch.log2(l)) * LN2


@torch.library.custom_op("flashsim_kernels::fa1", mutates_args=())
def fa1_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return fa1_forward(
        q, k, v, right == 0, scale, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages
    )


@fa1_op.register_fake
def _(q, k, v, *_):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(fa1_op)


def fa1(
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
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of what the launch table has for the GPU, dtype and head dim.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    fp32 products are exact fp32 (no TF32). Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("fa1", q=q, k=k, v=v)
    left, right = sides("fa1", causal, None)
    o, lse = fa1_op(q, k, v, left, right, scale, deterministic, BLOCK_M, BLOCK_N, num_warps, num_stages)
    return (o, lse) if return_lse else o
