"""Block-sparse FlashAttention, forward: of the blocks of scores, only those that a mask leaves are computed.

Algorithm 5 of the FlashAttention paper (arXiv 2205.14135) with the loops of FlashAttention-2 (arXiv 2307.08691,
algorithm 1): a program has a tile of queries and walks a list of the blocks of keys that they see, so that time goes
with what remains of the scores. `block_mask` makes the lists, `block_sparse_backward` has the backward pass.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import check_attention, check_tensors, padded
from flashsim_kernels.block_mask import block_lists, check_mask, count, launch_of, visible_blocks
from flashsim_kernels.block_sparse_backward import block_sparse_backward_op

LN2 = tl.constexpr(0.6931471805599453)
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
def store_rows(X, x, first, end, stride, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    at = X + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(first + rows < end)[:, None] & (columns < COLUMNS)[None, :])


@triton.jit
def start_of_tile(BLOCKS, t, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """First row or column of tile `t` of those that the blocks of a list are made of."""
    tiles: tl.constexpr = MASK_BLOCK // BLOCK
    return tl.load(BLOCKS + t // tiles) * MASK_BLOCK + t % tiles * BLOCK


@triton.jit
def attend(
    acc, l, m, q, last_key,
    K, V, BLOCKS,
    stride_ks, stride_vs,
    begin, end, seqlen_k,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Algorithm 1, lines 6 to 11, over the tiles `begin` to `end` - 1 of the list. No row sees a key after its
    `last_key`."""
    for t in tl.range(begin, end):  # 6
        j = start_of_tile(BLOCKS, t, MASK_BLOCK, BLOCK_N)
        k = load_rows(K, j, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D, MASKED)  # 7
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # 8: S = Q K_j^T
        if MASKED:
            keys = j + tl.arange(0, BLOCK_N)
            s = tl.where(keys[None, :] <= last_key[:, None], s * qk_scale, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))  # 9
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that has seen no key yet
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)  # 9
            p = tl.exp2(s * qk_scale - m_new[:, None])  # one FFMA and one EX2 an element
            alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_rows(V, j, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV, MASKED)  # 7
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # 10: O = diag(alpha) O + P V_j
        m = m_new
    return acc, l, m


@triton.jit
def block_sparse_fwd(
    Q, K, V, O, LSE, BLOCKS, COUNTS, WHOLE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_mb, stride_mh,
    seqlen_q, seqlen_k, heads, group, blocks_k,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 for BLOCK_M queries of one head. For each row of the mask, BLOCKS has the blocks that are seen, in
    rising order, COUNTS their number, and WHOLE that of those, the first ones, of which every query sees every key."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 3
    K += b * stride_kb + h // group * stride_kh
    V += b * stride_vb + h // group * stride_vh
    mask_row = b * stride_mb + h * stride_mh + start // MASK_BLOCK
    BLOCKS += mask_row * blocks_k
    tiles: tl.constexpr = MASK_BLOCK // BLOCK_N
    whole, count = tl.load(WHOLE + mask_row) * tiles, tl.load(COUNTS + mask_row) * tiles
    rows = start + tl.arange(0, BLOCK_M)
    last_key = tl.full([BLOCK_M], 0, tl.int32) + (seqlen_k - 1)
    if CAUSAL:
        last_key = rows + (seqlen_k - seqlen_q)

    q = load_rows(Q + b * stride_qb + h * stride_qh, start, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D, True)  # 4
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # 5
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, l, m = attend(
        acc, l, m, q, last_key, K, V, BLOCKS, stride_ks, stride_vs, 0, whole, seqlen_k, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASK_BLOCK, False,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, last_key, K, V, BLOCKS, stride_ks, stride_vs, whole, count, seqlen_k, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASK_BLOCK, True,
    )  # fmt: skip

    # A row without keys: O is 0, LSE is -inf.
    l = tl.where(m == float("-inf"), 1.0, l)
    o = acc / l[:, None]  # 12
    store_rows(O + b * stride_ob + h * stride_oh, o, start, seqlen_q, stride_os, BLOCK_M, D_V, BLOCK_DV)  # 14
    tl.store(LSE + (b * heads + h) * seqlen_q + rows, (m + tl.log2(l)) * LN2, mask=rows < seqlen_q)  # 13, 15


def block_sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    mask_block: int,
    causal: bool,
    scale: float | None,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches."""
    check_attention("block_sparse", q, k, v, scale=scale)
    check_mask(q, k, block_mask, mask_block, overrides)
    launch = launch_of("block_sparse_fwd", q, v, mask_block, overrides)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return o, lse
    seen, whole = visible_blocks(block_mask, mask_block, seqlen_q, seqlen_k, causal)
    blocks, counts, *strides = block_lists(seen)
    with torch.cuda.device_of(q):
        block_sparse_fwd[(triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch)](
            q, k, v, o, lse, blocks, counts, count(whole),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *strides,
            seqlen_q, seqlen_k, heads, heads // heads_kv, blocks.shape[3],
            (d**-0.5 if scale is None else scale) * LOG2E,
            D=d, D_V=d_v, BLOCK_D=padded(d), BLOCK_DV=padded(d_v), MASK_BLOCK=mask_block, CAUSAL=causal,
            **launch,
        )  # fmt: skip
    return o, lse


@torch.library.custom_op("flashsim_kernels::block_sparse", mutates_args=())
def block_sparse_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    mask_block: int,
    causal: bool,
    scale: float | None,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return block_sparse_forward(
        q, k, v, block_mask, mask_block, causal, scale,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@block_sparse_op.register_fake
def _(q, k, v, *_):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


def save_for_backward(ctx, inputs, output):
    q, k, v, block_mask, ctx.mask_block, ctx.causal, ctx.scale, *_ = inputs
    ctx.save_for_backward(q, k, v, block_mask, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, do, dlse):
    q, k, v, block_mask, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    found = block_sparse_backward_op(q, k, v, block_mask, o, lse, do, dlse, ctx.mask_block, ctx.causal, ctx.scale)
    return *found, *[None] * 8


block_sparse_op.register_autograd(backward, setup_context=save_for_backward)


def block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    mask_block: int = 128,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V over the keys that a mask leaves, and with `return_lse` the logarithm of the sum of
    exponentials of each row.

    q: (batch, seqlen_q, heads, head_dim), fp16, bf16 or fp32; k: (batch, seqlen_k, heads_kv, head_dim), v: (batch,
    seqlen_k, heads_kv, head_dim_v), of the same dtype. heads_kv divides heads: query head h reads KV head
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. Strides: any, but 1 along head_dim.

    block_mask: (batch or 1, heads or 1, blocks of queries, blocks of keys), bool: where it is true, the queries of that
        block see the keys of that block. Each has `mask_block` rows or keys, a power of two from 16 to 1024, the last
        ones those that are left.
    causal: moreover, row i sees key c only if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    scale: by default head_dim ** -0.5.
    BLOCK_M, BLOCK_N, num_warps, num_stages: of the forward pass, in place of those that the launch table has for the
        GPU, dtype and head dim; tiles must divide mask_block. The table's are made smaller where they do not.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both, the same bits in every run.

    fp32 products are exact fp32 (no TF32). Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("block_sparse", q=q, k=k, v=v, block_mask=block_mask)
    o, lse = block_sparse_op(q, k, v, block_mask, mask_block, causal, scale, BLOCK_M, BLOCK_N, num_warps, num_stages)
    return (o, lse) if return_lse else o
