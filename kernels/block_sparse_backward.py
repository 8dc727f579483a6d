"""Block-sparse FlashAttention, backward (arXiv 2307.08691, algorithm 2, for the blocks of scores that a mask leaves).

    block_sparse_dq     dQ of a tile of queries, by the lists of the forward pass
    block_sparse_dkdv   dK and dV of a tile of keys, by lists of the mask's columns

Both compute S and dP, seven products in all: dQ needs no atomics, and all gradients are the same bits in every run.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import padded
from flashsim_kernels.block_mask import block_lists, launch_of, visible_blocks

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(X, first, end, stride, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Rows `first` to `first` + BLOCK of X, of COLUMNS elements each; 0 beyond row `end` and in the padding."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    # Only what lies inside a tile is 32 bits wide: tensors may have more than 2^31 elements.
    at = X + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if PADDED > COLUMNS:
        return tl.load(at, mask=(first + rows < end)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    return tl.load(at, mask=(first + rows < end)[:, None], other=0.0)


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
def block_sparse_dq(
    Q, K, V, O, DO, LSE, DLSE, Delta, DQ, BLOCKS, COUNTS,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_gb, stride_gs, stride_gh,
    stride_db, stride_ds, stride_dh,
    stride_mb, stride_mh,
    seqlen_q, seqlen_k, heads, group, blocks_k,
    scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head, and Delta = rowsum(dO o O) - dLSE, which `block_sparse_dkdv` needs, too.
    Numbers are the lines of algorithm 2."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    K += b * stride_kb + h // group * stride_kh
    V += b * stride_vb + h // group * stride_vh
    mask_row = b * stride_mb + h * stride_mh + start // MASK_BLOCK
    BLOCKS += mask_row * blocks_k
    tiles: tl.constexpr = MASK_BLOCK // BLOCK_N
    rows = start + tl.arange(0, BLOCK_M)
    at = (b * heads + h) * seqlen_q + rows
    q = load_rows(Q + b * stride_qb + h * stride_qh, start, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D)
    o = load_rows(O + b * stride_ob + h * stride_oh, start, seqlen_q, stride_os, BLOCK_M, D_V, BLOCK_DV)
    do = load_rows(DO + b * stride_gb + h * stride_gh, start, seqlen_q, stride_gs, BLOCK_M, D_V, BLOCK_DV)
    lse = tl.load(LSE + at, mask=rows < seqlen_q, other=float("inf")) * LOG2E
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # 4
    if HAS_DLSE:  # d LSE / d S = P, so that dS = P o (dP - D + dLSE)
        delta -= tl.load(DLSE + at, mask=rows < seqlen_q, other=0.0)
    tl.store(Delta + at, delta, mask=rows < seqlen_q)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for t in tl.range(0, tl.load(COUNTS + mask_row) * tiles):
        j = start_of_tile(BLOCKS, t, MASK_BLOCK, BLOCK_N)
        keys = j + tl.arange(0, BLOCK_N)
        k = load_rows(K, j, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # 10
        seen = keys[None, :] < seqlen_k
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None] + (seqlen_k - seqlen_q))
        p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - lse[:, None]), 0.0)  # 11
        v = load_rows(V, j, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # 13
        ds = (p * (dp - delta[:, None])).to(k.dtype)  # 14
        dq = tl.dot(ds, k, dq, input_precision="ieee")  # 15
    store_rows(DQ + b * stride_db + h * stride_dh, dq * scale, start, seqlen_q, stride_ds, BLOCK_M, D, BLOCK_D)


@triton.jit
def block_sparse_dkdv(
    Q, K, V, DO, LSE, Delta, DK, DV, BLOCKS, COUNTS,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_dkb, stride_dks, stride_dkh,
    stride_dvb, stride_dvs, stride_dvh,
    stride_mb, stride_mh,
    seqlen_q, seqlen_k, heads, group, blocks_q,
    scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one KV head. For each column of the mask, BLOCKS has the blocks of queries that see
    it, and COUNTS their number. S and P are transposed, (keys, queries), as in `fa2_backward`."""
    start, h_kv, b = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 5
    keys = start + tl.arange(0, BLOCK_N)
    k = load_rows(K + b * stride_kb + h_kv * stride_kh, start, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D)  # 6
    v = load_rows(V + b * stride_vb + h_kv * stride_vh, start, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # 7
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    tiles: tl.constexpr = MASK_BLOCK // BLOCK_M
    for g in range(group):
        h = h_kv * group + g
        mask_column = b * stride_mb + h * stride_mh + start // MASK_BLOCK
        for t in tl.range(0, tl.load(COUNTS + mask_column) * tiles):  # 8
            i = start_of_tile(BLOCKS + mask_column * blocks_q, t, MASK_BLOCK, BLOCK_M)
            rows = i + tl.arange(0, BLOCK_M)
            at = (b * heads + h) * seqlen_q + rows
            q = load_rows(Q + b * stride_qb + h * stride_qh, i, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D)  # 9
            lse = tl.load(LSE + at, mask=rows < seqlen_q, other=float("inf")) * LOG2E  # P = 0 beyond the last query
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # 10: S = Q K_j^T
            p = tl.exp2(s * (scale * LOG2E) - lse[None, :])  # 11: P = exp(S - L)
            if CAUSAL:
                p = tl.where(keys[:, None] <= rows[None, :] + (seqlen_k - seqlen_q), p, 0.0)
            do = load_rows(DO + b * stride_gb + h * stride_gh, i, seqlen_q, stride_gs, BLOCK_M, D_V, BLOCK_DV)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # 12: dV += P^T dO_i
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # 13: dP = dO V_j^T
            delta = tl.load(Delta + at, mask=rows < seqlen_q, other=0.0)
            ds = (p * (dp - delta[None, :])).to(q.dtype)  # 14: dS = P o (dP - D)
            dk = tl.dot(ds, q, dk, input_precision="ieee")  # 16: dK += dS^T Q_i
    DK += b * stride_dkb + h_kv * stride_dkh
    DV += b * stride_dvb + h_kv * stride_dvh
    store_rows(DK, dk * scale, start, seqlen_k, stride_dks, BLOCK_N, D, BLOCK_D)  # 18
    store_rows(DV, dv, start, seqlen_k, stride_dvs, BLOCK_N, D_V, BLOCK_DV)


def launch_block_sparse_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    mask_block: int,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not (batch and seqlen_q and seqlen_k):
        return dq.zero_(), dk.zero_(), dv.zero_()
    do = do if do.stride(3) == 1 else do.contiguous()  # autograd may hand over what is expanded
    dlse = None if dlse is None else dlse.contiguous()
    Delta = torch.empty_like(lse)
    seen, _ = visible_blocks(block_mask, mask_block, seqlen_q, seqlen_k, causal)
    sizes = seqlen_q, seqlen_k, heads, heads // heads_kv
    scale = d**-0.5 if scale is None else scale
    common = {"D": d, "D_V": d_v, "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v)}
    common |= {"MASK_BLOCK": mask_block, "CAUSAL": causal}
    inputs = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    with torch.cuda.device_of(q):
        launch = launch_of("block_sparse_dq", q, v, mask_block, {})
        blocks, counts, *strides = block_lists(seen)
        block_sparse_dq[(triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch)](
            q, k, v, o, do, lse, dlse, Delta, dq, blocks, counts,
            *inputs, *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3], *strides,
            *sizes, blocks.shape[3], scale, HAS_DLSE=dlse is not None, **common, **launch,
        )  # fmt: skip
        launch = launch_of("block_sparse_dkdv", q, v, mask_block, {})
        blocks, counts, *strides = block_lists(seen.transpose(2, 3))
        block_sparse_dkdv[(triton.cdiv(seqlen_k, launch["BLOCK_N"]), heads_kv, batch)](
            q, k, v, do, lse, Delta, dk, dv, blocks, counts,
            *inputs, *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *strides,
            *sizes, blocks.shape[3], scale, **common, **launch,
        )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("flashsim_kernels::block_sparse_backward", mutates_args=())
def block_sparse_backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    mask_block: int,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_block_sparse_backward(q, k, v, block_mask, o, lse, do, dlse, mask_block, causal, scale)


@block_sparse_backward_op.register_fake
def _(q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
