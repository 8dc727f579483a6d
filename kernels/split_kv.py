"""Split-KV decoding (Flash-Decoding), forward: the keys are split, too, where few queries cannot fill a GPU.

A program attends to one split of the keys and leaves its part of O, normalized, and the LSE of its keys; a second
kernel adds the parts up, each with the weight exp(LSE_s - LSE). The inner loop is FlashAttention-2's (arXiv
2307.08691, algorithm 1); splits and their number are those of csrc/flash_attn in Dao-AILab/flash-attention
(flash_fwd_splitkv_kernel, num_splits_heuristic). Gradients are those of `fa2_backward`.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import ArgumentError, check_attention, check_tensors, launch_arguments, padded, sides
from flashsim_kernels.fa2_backward import register_gradients

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
MOST_SPLITS, MOST_SPLITS_CHOSEN = 1024, 128
SMS_ASSUMED = 132
"""Where no GPU can be asked: H100's and H200's."""


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
def attend(
    acc, l, m, q, last_key,
    K, V,
    stride_ks, stride_vs,
    begin, end, seqlen_k,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Algorithm 1, lines 6 to 11, over the keys from `begin` to `end`. A row sees the keys up to its `last_key`."""
    for j in tl.range(begin, end, BLOCK_N):  # 6
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
def split_kv_fwd(
    Q, K, V, O, LSE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_op, stride_ob, stride_os, stride_oh,
    stride_lp,
    seqlen_q, seqlen_k, heads, group,
    keys_in_split,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PACK_GQA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 for BLOCK_M rows and one split of `keys_in_split` keys, which is a multiple of BLOCK_N.

    A row is a query of one head; with PACK_GQA, of any of the `group` heads that share the KV head, r being query
    r // group of the r % group-th of them: K and V are read once for all, and tiles are full with fewer queries.
    """
    tiles_m = tl.cdiv(seqlen_q * group if PACK_GQA else seqlen_q, BLOCK_M)
    start, h = tl.program_id(0) % tiles_m * BLOCK_M, tl.program_id(0) // tiles_m
    split, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, first, last = start + tl.arange(0, BLOCK_M), start, start + BLOCK_M - 1
    head, kv_head = h, h // group
    if PACK_GQA:
        head, kv_head = h * group + rows % group, h
        rows, first, last = rows // group, first // group, last // group
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    is_row = rows < seqlen_q
    rows_64, head = rows.to(tl.int64), head.to(tl.int64)
    Q += b * stride_qb + (rows_64 * stride_qs + head * stride_qh)[:, None] + d[None, :]
    K += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    V += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    O += split * stride_op + b * stride_ob + (rows_64 * stride_os + head * stride_oh)[:, None] + dv[None, :]
    LSE += split * stride_lp + (b * heads + head) * seqlen_q + rows_64

    # The keys of this split that some row sees, and the tiles that all rows see whole.
    begin = tl.program_id(1) * keys_in_split
    end = tl.minimum(begin + keys_in_split, seqlen_k)
    whole_end, last_key = end, tl.full([BLOCK_M], 0, tl.int32) + (seqlen_k - 1)
    if CAUSAL:
        last_key = rows + (seqlen_k - seqlen_q)
        whole_end = tl.minimum(end, tl.maximum(first + seqlen_k - seqlen_q + 1, 0))
        end = tl.minimum(end, tl.maximum(last + seqlen_k - seqlen_q + 1, 0))
    whole_end = tl.maximum(whole_end // BLOCK_N * BLOCK_N, begin)

    q = tl.load(Q, mask=is_row[:, None] & (d < D)[None, :], other=0.0)  # 4
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # 5
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, l, m = attend(
        acc, l, m, q, last_key, K, V, stride_ks, stride_vs, begin, whole_end, seqlen_k, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, False,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, last_key, K, V, stride_ks, stride_vs, whole_end, end, seqlen_k, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, True,
    )  # fmt: skip

    # A row without keys in this split: O is 0, LSE is -inf.
    l = tl.where(m == float("-inf"), 1.0, l)
    o = acc / l[:, None]  # 12
    tl.store(O, o.to(O.dtype.element_ty), mask=is_row[:, None] & (dv < D_V)[None, :])
    tl.store(LSE, (m + tl.log2(l)) * LN2, mask=is_row)


@triton.jit
def split_kv_combine(
    O_part, LSE_part, O, LSE,
    stride_op, stride_lp,
    stride_ob, stride_os, stride_oh,
    num_splits, num_rows, seqlen_q, heads,
    D_V: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """O = sum_s exp(LSE_s - LSE) O_s, with LSE = log sum_s exp(LSE_s), of ROWS rows, which are (batch, head, query).
    SPLITS: a power of two from num_splits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    splits, dv = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DV)
    is_row = rows < num_rows
    is_o = is_row[:, None] & (dv < D_V)[None, :]
    LSE_part += rows
    O_part += rows[:, None] * D_V + dv[None, :]

    parts = LSE_part[None, :] + splits.to(tl.int64)[:, None] * stride_lp
    lses = tl.load(parts, mask=(splits < num_splits)[:, None] & is_row[None, :], other=float("-inf"))
    m = tl.max(lses, 0)
    m = tl.where(m == float("-inf"), 0.0, m)  # a row without keys: all weights are 0
    total = tl.sum(tl.exp2((lses - m[None, :]) * LOG2E), 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for _ in range(num_splits):
        weight = tl.exp2((tl.load(LSE_part, mask=is_row, other=float("-inf")) - m) * LOG2E)
        acc += weight[:, None] * tl.load(O_part, mask=is_o, other=0.0)
        LSE_part += stride_lp
        O_part += stride_op
    o = acc / divisor[:, None]
    lse = tl.where(total == 0.0, float("-inf"), m + tl.log2(divisor) * LN2)
    b, h, query = rows // seqlen_q // heads, rows // seqlen_q % heads, rows % seqlen_q
    O += (b * stride_ob + query * stride_os + h * stride_oh)[:, None] + dv[None, :]
    tl.store(O, o.to(O.dtype.element_ty), mask=is_o)
    tl.store(LSE + rows, lse, mask=is_row)


def splits_heuristic(tiles: int, kv_tiles: int, slots: int) -> int:
    """The smallest number of splits that keeps `slots` CTAs nearly as busy as the best number does: 85 % of it.

    `tiles`: tiles of rows, of all heads and batch entries, each with `kv_tiles` KV tiles. One split where they are
    enough for 80 % of the slots (num_splits_heuristic in csrc/flash_attn/flash_api.cpp of Dao-AILab/flash-attention).
    """
    if tiles >= 0.8 * slots:
        return 1
    most = min(MOST_SPLITS_CHOSEN, slots, kv_tiles)
    # A number that leaves the longest split as long as one split less does is none.
    possible = [n for n in range(1, most + 1) if n == 1 or triton.cdiv(kv_tiles, n) != triton.cdiv(kv_tiles, n - 1)]
    efficiency = {n: (tiles * n / slots) / triton.cdiv(tiles * n, slots) for n in possible}
    return next(n for n in possible if efficiency[n] >= 0.85 * max(efficiency.values()))


def slots(device: torch.device) -> int:
    """CTAs that run at a time, two on an SM."""
    if device.type != "cuda":
        return 2 * SMS_ASSUMED
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def split_kv_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    num_splits: int | None,
    pack_gqa: bool,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches."""
    check_attention("split_kv", q, k, v, scale=scale)
    if num_splits is not None and not 1 <= num_splits <= MOST_SPLITS:
        raise ArgumentError([f"split_kv: num_splits: got {num_splits}, allowed are 1 to {MOST_SPLITS}"])
    launch = launch_arguments("split_kv", "split_kv_fwd", q, v, overrides)
    combine = launch_arguments("split_kv", "split_kv_combine", q, v, {})
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return o, lse
    group = heads // heads_kv
    packed = pack_gqa and group > 1
    rows, heads_here = (seqlen_q * group, heads_kv) if packed else (seqlen_q, heads)
    if overrides.get("BLOCK_M") is None:
        launch["BLOCK_M"] = min(launch["BLOCK_M"], max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, launch["BLOCK_M"]) * heads_here
    kv_tiles = triton.cdiv(seqlen_k, launch["BLOCK_N"])
    if num_splits is None:
        num_splits = splits_heuristic(tiles * batch, max(1, kv_tiles), slots(q.device))
    if num_splits == 1:
        o_part, lse_part, strides = o, lse, (0, *o.stride()[:3], 0)
    else:
        o_part = torch.empty(num_splits, batch, heads, seqlen_q, d_v, dtype=torch.float32, device=q.device)
        lse_part = torch.empty(num_splits, batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
        of_part, of_batch, of_head, of_query, _ = o_part.stride()
        strides = of_part, of_batch, of_query, of_head, lse_part.stride(0)
    with torch.cuda.device_of(q):
        split_kv_fwd[(tiles, num_splits, batch)](
            q, k, v, o_part, lse_part,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
            seqlen_q, seqlen_k, heads, group,
            triton.cdiv(kv_tiles, num_splits) * launch["BLOCK_N"],
            (d**-0.5 if scale is None else scale) * LOG2E.value,
            D=d, D_V=d_v, BLOCK_D=padded(d), BLOCK_DV=padded(d_v), CAUSAL=causal, PACK_GQA=packed,
            **launch,
        )  # fmt: skip
        if num_splits > 1:
            split_kv_combine[(triton.cdiv(lse.numel(), combine["ROWS"]),)](
                o_part, lse_part, o, lse,
                o_part.stride(0), lse_part.stride(0), *o.stride()[:3],
                num_splits, lse.numel(), seqlen_q, heads,
                D_V=d_v, BLOCK_DV=padded(d_v), SPLITS=triton.next_power_of_2(num_splits),
                **combine,
            )  # fmt: skip
    return o, lse


@torch.library.custom_op("flashsim_kernels::split_kv", mutates_args=())
def split_kv_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    num_splits: int | None,
    pack_gqa: bool,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return split_kv_forward(
        q, k, v, right == 0, scale, num_splits, pack_gqa,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@split_kv_op.register_fake
def _(q, k, v, *_):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(split_kv_op)


def split_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    num_splits: int | None = None,
    pack_gqa: bool = True,
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
    deterministic: of the gradients, see `fa2_backward`. O and LSE are the same bits in every run.
    num_splits: parts of the keys, 1 to 1024, some of which may be empty; None: by `splits_heuristic`, from the number
        of SMs (132 where there is no GPU to ask).
    pack_gqa: query heads that share a KV head are rows of one tile.
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of what the launch table has for the GPU, dtype and head dim; its
        BLOCK_M is made smaller where there are fewer rows.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    fp32 products are exact fp32 (no TF32). Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("split_kv", q=q, k=k, v=v)
    left, right = sides("split_kv", causal, None)
    o, lse = split_kv_op(
        q, k, v, left, right, scale, deterministic, num_splits, pack_gqa, BLOCK_M, BLOCK_N, num_warps, num_stages
    )
    return (o, lse) if return_lse else o
