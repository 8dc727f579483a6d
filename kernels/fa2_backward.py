"""FlashAttention-2, backward (Dao, arXiv 2307.08691, algorithm 2). O and LSE may come from any forward pass.

    fa2_bwd_preprocess  line 4: D = rowsum(dO o O)
    fa2_bwd             lines 5 to 19: one program for each block of keys, an inner loop over the query tiles that see
                        it; dQ is added up in fp32 by atomics, in an order that is another one in every run
    fa2_bwd_convert_dq  dQ in the inputs' dtype

With `deterministic`, fa2_bwd leaves dQ out, and `fa2_bwd_dq` computes S and dP again, one program for each block of
queries: seven products in place of five, the same bits in every run.

Query heads that share a KV head are summed up by one program, in a loop; the published kernel has a program for each
of them, and sums their dK and dV in another kernel.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import (
    ArgumentError,
    capability,
    check_attention,
    check_tensors,
    launch_arguments,
    padded,
    sides,
)

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
def fa2_bwd_preprocess(
    O, DO, DLSE, Delta,
    stride_ob, stride_os, stride_oh,
    stride_gb, stride_gs, stride_gh,
    seqlen_q, heads,
    D_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO o O). A gradient of LSE is subtracted: d LSE / d S = P, so that dS = P o (dP - D + dLSE)."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    O += b * stride_ob + h.to(tl.int64) * stride_oh
    DO += b * stride_gb + h.to(tl.int64) * stride_gh
    rows = start + tl.arange(0, BLOCK_M)
    o = load_rows(O, start, seqlen_q, stride_os, BLOCK_M, D_V, BLOCK_DV).to(tl.float32)
    do = load_rows(DO, start, seqlen_q, stride_gs, BLOCK_M, D_V, BLOCK_DV).to(tl.float32)
    delta = tl.sum(o * do, 1)
    at = (b * heads + h) * seqlen_q + rows
    if HAS_DLSE:
        delta -= tl.load(DLSE + at, mask=rows < seqlen_q, other=0.0)
    tl.store(Delta + at, delta, mask=rows < seqlen_q)


@triton.jit
def add_query_tiles(
    dk, dv, k, v, keys,
    Q, DO, DQ, LSE, Delta,
    stride_qs, stride_gs,
    begin, end, seqlen_q, seqlen_k,
    first_seen, last_seen,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    ATOMIC_DQ: tl.constexpr, TRANSPOSED_DQ: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, lines 8 to 17, over the queries from `begin` to `end`. Tiles of S, P and dS are transposed, (keys,
    queries): for dV and dK they are multiplied from the left, and can come from registers. Of a query beyond the last
    one Q, dO and D are 0, and so is what it adds."""
    for i in tl.range(begin, end, BLOCK_M):  # 8
        q = load_rows(Q, i, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D)  # 9
        rows = i + tl.arange(0, BLOCK_M)
        lse = tl.load(LSE + rows, mask=rows < seqlen_q, other=0.0) * LOG2E
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # 10: S = Q K_j^T
        p = tl.exp2(s * qk_scale - lse[None, :])  # 11: P = exp(S - L)
        if MASKED:
            seen = keys[:, None] < seqlen_k
            if LEFT:
                seen = seen & (keys[:, None] >= rows[None, :] + first_seen)
            if RIGHT:
                seen = seen & (keys[:, None] <= rows[None, :] + last_seen)
            p = tl.where(seen, p, 0.0)
        do = load_rows(DO, i, seqlen_q, stride_gs, BLOCK_M, D_V, BLOCK_DV)  # 9
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # 12: dV += P^T dO_i
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # 13: dP = dO V_j^T
        delta = tl.load(Delta + rows, mask=rows < seqlen_q, other=0.0)  # 9
        ds = (p * (dp - delta[None, :])).to(q.dtype)  # 14: dS = P o (dP - D)
        dk = tl.dot(ds, q, dk, input_precision="ieee")  # 16: dK += dS^T Q_i
        if ATOMIC_DQ:  # after dK, for which Q_i is in registers already
            # Whole tiles, and rows of constant length: a thread needs one address and no predicates.
            into = DQ + tl.cast(i, tl.int64) * BLOCK_D
            if TRANSPOSED_DQ:
                dq = tl.dot(tl.trans(k), ds, input_precision="ieee")  # 15: dQ_i += dS K_j
                at = (tl.arange(0, BLOCK_M) * BLOCK_D)[None, :] + tl.arange(0, BLOCK_D)[:, None]
            else:
                dq = tl.dot(tl.trans(ds), k, input_precision="ieee")  # 15
                at = (tl.arange(0, BLOCK_M) * BLOCK_D)[:, None] + tl.arange(0, BLOCK_D)[None, :]
            tl.atomic_add(into + at, dq, sem="relaxed")
    return dk, dv


@triton.jit
def fa2_bwd(
    Q, K, V, DO, LSE, Delta, DQ, DK, DV,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_dkb, stride_dks, stride_dkh,
    stride_dvb, stride_dvs, stride_dvh,
    seqlen_q, seqlen_k, heads, group,
    left, right,
    scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ATOMIC_DQ: tl.constexpr, TRANSPOSED_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one KV head; with ATOMIC_DQ also their part of dQ: in fp32, not yet scaled, (batch,
    heads, queries, head_dim), where queries are whole tiles of BLOCK_M and head_dim is that of a tile."""
    start, h_kv, b = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2).to(tl.int64)  # 5
    K += b * stride_kb + h_kv.to(tl.int64) * stride_kh
    V += b * stride_vb + h_kv.to(tl.int64) * stride_vh
    keys = start + tl.arange(0, BLOCK_N)
    k = load_rows(K, start, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D)  # 6
    v = load_rows(V, start, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # 7
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # The queries that see some key, from the tile that the first of them lies in, and the tiles that see all keys.
    last = tl.minimum(start + BLOCK_N, seqlen_k) - 1
    first_seen, last_seen = seqlen_k - seqlen_q - left, seqlen_k - seqlen_q + right
    begin, whole, whole_end, end = 0, 0, seqlen_q, seqlen_q
    if RIGHT:
        begin = tl.maximum(start - last_seen, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(last - last_seen, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        end = tl.minimum(tl.maximum(last - first_seen + 1, 0), seqlen_q)
        whole_end = tl.minimum(tl.maximum(start - first_seen + 1, 0), seqlen_q)
        # The last tile of queries may be short: what it lacks is loaded as 0.
        whole_end = tl.where(whole_end < seqlen_q, whole_end // BLOCK_M * BLOCK_M, end)
    if RIGHT or LEFT:
        whole = tl.minimum(whole, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    # Keys that do not exist are in every tile.
    whole = tl.where(start + BLOCK_N > seqlen_k, tl.cdiv(end, BLOCK_M) * BLOCK_M, whole)
    whole_end = tl.maximum(whole_end, whole)

    for h in range(h_kv * group, (h_kv + 1) * group):
        head = tl.cast(h, tl.int64)
        Q_h, DO_h = Q + b * stride_qb + head * stride_qh, DO + b * stride_gb + head * stride_gh
        first_row = (b * heads + head) * seqlen_q
        LSE_h, Delta_h = LSE + first_row, Delta + first_row
        DQ_h = DQ + (b * heads + head) * tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M * BLOCK_D
        dk, dv = add_query_tiles(
            dk, dv, k, v, keys, Q_h, DO_h, DQ_h, LSE_h, Delta_h, stride_qs, stride_gs,
            begin, whole, seqlen_q, seqlen_k, first_seen, last_seen, scale * LOG2E,
            D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, LEFT, RIGHT, True, ATOMIC_DQ, TRANSPOSED_DQ,
        )  # fmt: skip
        dk, dv = add_query_tiles(
            dk, dv, k, v, keys, Q_h, DO_h, DQ_h, LSE_h, Delta_h, stride_qs, stride_gs,
            whole, whole_end, seqlen_q, seqlen_k, first_seen, last_seen, scale * LOG2E,
            D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, LEFT, RIGHT, False, ATOMIC_DQ, TRANSPOSED_DQ,
        )  # fmt: skip
        if LEFT:
            dk, dv = add_query_tiles(
                dk, dv, k, v, keys, Q_h, DO_h, DQ_h, LSE_h, Delta_h, stride_qs, stride_gs,
                whole_end, end, seqlen_q, seqlen_k, first_seen, last_seen, scale * LOG2E,
                D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, LEFT, RIGHT, True, ATOMIC_DQ, TRANSPOSED_DQ,
            )  # fmt: skip

    DK += b * stride_dkb + h_kv.to(tl.int64) * stride_dkh
    DV += b * stride_dvb + h_kv.to(tl.int64) * stride_dvh
    store_rows(DK, dk * scale, start, seqlen_k, stride_dks, BLOCK_N, D, BLOCK_D)  # 18
    store_rows(DV, dv, start, seqlen_k, stride_dvs, BLOCK_N, D_V, BLOCK_DV)


@triton.jit
def fa2_bwd_convert_dq(
    ACC, DQ,
    stride_db, stride_ds, stride_dh,
    seqlen_q, rows_of_acc, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    ACC += (b * heads + h) * rows_of_acc * BLOCK_D
    dq = load_rows(ACC, start, seqlen_q, BLOCK_D, BLOCK_M, D, BLOCK_D)
    store_rows(DQ + b * stride_db + h * stride_dh, dq * scale, start, seqlen_q, stride_ds, BLOCK_M, D, BLOCK_D)


@triton.jit
def add_key_tiles(
    dq, q, do, lse, delta, rows,
    K, V,
    stride_ks, stride_vs,
    begin, end, seqlen_k,
    first_seen, last_seen,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, lines 10, 11 and 13 to 15, over the keys from `begin` to `end`."""
    for j in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, j, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # 10
        p = tl.exp2(s * qk_scale - lse[:, None])  # 11
        if MASKED:
            keys = j + tl.arange(0, BLOCK_N)
            seen = keys[None, :] < seqlen_k
            if LEFT:
                seen = seen & (keys[None, :] >= rows[:, None] + first_seen)
            if RIGHT:
                seen = seen & (keys[None, :] <= rows[:, None] + last_seen)
            p = tl.where(seen, p, 0.0)
        v = load_rows(V, j, seqlen_k, stride_vs, BLOCK_N, D_V, BLOCK_DV)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # 13
        ds = (p * (dp - delta[:, None])).to(k.dtype)  # 14
        dq = tl.dot(ds, k, dq, input_precision="ieee")  # 15
    return dq


@triton.jit
def fa2_bwd_dq(
    Q, K, V, DO, LSE, Delta, DQ,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_db, stride_ds, stride_dh,
    seqlen_q, seqlen_k, heads, group,
    left, right,
    scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head, over the key tiles of the forward pass."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    K += b * stride_kb + h // group * stride_kh
    V += b * stride_vb + h // group * stride_vh
    rows = start + tl.arange(0, BLOCK_M)
    q = load_rows(Q + b * stride_qb + h * stride_qh, start, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D)
    do = load_rows(DO + b * stride_gb + h * stride_gh, start, seqlen_q, stride_gs, BLOCK_M, D_V, BLOCK_DV)
    at = (b * heads + h) * seqlen_q + rows
    lse = tl.load(LSE + at, mask=rows < seqlen_q, other=0.0) * LOG2E
    delta = tl.load(Delta + at, mask=rows < seqlen_q, other=0.0)

    last = tl.minimum(start + BLOCK_M, seqlen_q) - 1
    first_seen, last_seen = seqlen_k - seqlen_q - left, seqlen_k - seqlen_q + right
    begin, whole, whole_end, end = 0, 0, seqlen_k, seqlen_k
    if RIGHT:
        whole_end = tl.minimum(tl.maximum(start + last_seen + 1, 0), seqlen_k)
        end = tl.minimum(tl.maximum(last + last_seen + 1, 0), seqlen_k)
    if LEFT:
        begin = tl.maximum(start + first_seen, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(last + first_seen, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_end = tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        dq = add_key_tiles(
            dq, q, do, lse, delta, rows, K, V, stride_ks, stride_vs, begin, whole, seqlen_k, first_seen, last_seen,
            scale * LOG2E, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, True,
        )  # fmt: skip
    dq = add_key_tiles(
        dq, q, do, lse, delta, rows, K, V, stride_ks, stride_vs, whole, whole_end, seqlen_k, first_seen, last_seen,
        scale * LOG2E, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, False,
    )  # fmt: skip
    dq = add_key_tiles(
        dq, q, do, lse, delta, rows, K, V, stride_ks, stride_vs, whole_end, end, seqlen_k, first_seen, last_seen,
        scale * LOG2E, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, True,
    )  # fmt: skip
    store_rows(DQ + b * stride_db + h * stride_dh, dq * scale, start, seqlen_q, stride_ds, BLOCK_M, D, BLOCK_D)


def launch_fa2_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks, and launches. Arguments as of `fa2_backward_op`."""
    check_attention("fa2_backward", q, k, v, scale=scale)
    _check_results(q, v, o, lse, do, dlse)
    main = launch_arguments("fa2_backward", "fa2_bwd_dkdv" if deterministic else "fa2_bwd", q, v, overrides)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not (batch and seqlen_q and seqlen_k):
        return dq.zero_(), dk.zero_(), dv.zero_()

    # What autograd hands over may be expanded, or spread in any way.
    o, do = (x if x.stride(3) == 1 else x.contiguous() for x in (o, do))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    Delta = torch.empty_like(lse)
    scale = d**-0.5 if scale is None else scale
    # wgmma has at least 64 rows; of a shorter tile of queries, dQ can have its columns in their place.
    wgmma = capability(q.device) // 10 == 9 and q.dtype != torch.float32
    transposed_dq = not deterministic and wgmma and main["BLOCK_M"] < 64
    masks = {"LEFT": left is not None, "RIGHT": right is not None}
    widths = {"D": d, "D_V": d_v, "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v)}
    sizes = (seqlen_q, seqlen_k, heads, heads // heads_kv, left or 0, right or 0, scale)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])

    def by_queries(launch: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch

    by_keys = (triton.cdiv(seqlen_k, main["BLOCK_N"]), heads_kv, batch)
    with torch.cuda.device_of(q):
        launch = launch_arguments("fa2_backward", "fa2_bwd_preprocess", q, v, {})
        fa2_bwd_preprocess[by_queries(launch)](
            o, do, dlse, Delta, *o.stride()[:3], *do.stride()[:3], seqlen_q, heads,
            D_V=d_v, BLOCK_DV=padded(d_v), HAS_DLSE=dlse is not None, **launch,
        )  # fmt: skip
        acc, rows = dq, triton.cdiv(seqlen_q, main["BLOCK_M"]) * main["BLOCK_M"]
        if not deterministic:
            acc = torch.zeros(batch, heads, rows, padded(d), dtype=torch.float32, device=q.device)
        fa2_bwd[by_keys](
            q, k, v, do, lse, Delta, acc, dk, dv,
            *inputs, *dk.stride()[:3], *dv.stride()[:3], *sizes,
            ATOMIC_DQ=not deterministic, TRANSPOSED_DQ=transposed_dq, **widths, **masks, **main,
        )  # fmt: skip
        if deterministic:
            launch = launch_arguments("fa2_backward", "fa2_bwd_dq", q, v, overrides)
            fa2_bwd_dq[by_queries(launch)](
                q, k, v, do, lse, Delta, dq, *inputs, *dq.stride()[:3], *sizes, **widths, **masks, **launch
            )
        else:
            launch = launch_arguments("fa2_backward", "fa2_bwd_convert_dq", q, v, {})
            fa2_bwd_convert_dq[by_queries(launch)](
                acc, dq, *dq.stride()[:3], seqlen_q, rows, heads, scale, D=d, BLOCK_D=padded(d), **launch
            )
    return dq, dk, dv


def _check_results(
    q: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
) -> None:
    """What the forward pass returned for q and v, and the gradients of that. Raises ArgumentError."""
    batch, seqlen_q, heads, _ = q.shape
    of_o, of_lse = (batch, seqlen_q, heads, v.shape[3]), (batch, heads, seqlen_q)
    expected = {"o": (o, of_o, q.dtype), "do": (do, of_o, q.dtype), "lse": (lse, of_lse, torch.float32)}
    if dlse is not None:
        expected["dlse"] = (dlse, of_lse, torch.float32)
    wrong = []
    for name, (x, shape, dtype) in expected.items():
        if tuple(x.shape) != shape:
            wrong.append(f"fa2_backward: {name}: shape {tuple(x.shape)}, must be {shape}")
        if x.dtype != dtype:
            wrong.append(f"fa2_backward: {name}: dtype {x.dtype}, must be {dtype}")
        if x.device != q.device:
            wrong.append(f"fa2_backward: {name}: on {x.device}, must be on {q.device} like q")
    if wrong:
        raise ArgumentError(wrong)


@torch.library.custom_op("flashsim_kernels::fa2_backward", mutates_args=())
def fa2_backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    launch = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    return launch_fa2_backward(q, k, v, o, lse, do, dlse, left, right, scale, deterministic, **launch)


@fa2_backward_op.register_fake
def _(q, k, v, *rest, **options):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def register_gradients(operator) -> None:
    """Let the operator of a forward pass have the gradients of `fa2_backward`.

    Its first arguments must be q, k, v, left, right, scale, deterministic, as those of `fa2_backward_op`; it returns O
    and LSE.
    """

    def setup(ctx, inputs, output):
        q, k, v, ctx.left, ctx.right, ctx.scale, ctx.deterministic, *others = inputs
        ctx.without_gradient = 4 + len(others)
        ctx.save_for_backward(q, k, v, *output)
        ctx.set_materialize_grads(False)

    def backward(ctx, do, dlse):
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        found = fa2_backward_op(q, k, v, o, lse, do, dlse, ctx.left, ctx.right, ctx.scale, ctx.deterministic)
        return *found, *[None] * ctx.without_gradient

    operator.register_autograd(backward, setup_context=setup)


def fa2_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV of attention, from its inputs, its results and their gradients.

    q, k, v, causal, window, scale: as of the forward pass, see `fa2.fa2`. o, do: (batch, seqlen_q, heads, head_dim_v),
    in the inputs' dtype; lse, dlse: (batch, heads, seqlen_q), fp32. Any strides.

    deterministic: the same bits in every run, from two kernels that share nothing; else dQ is summed up by atomics.
        Always so under `torch.use_deterministic_algorithms(True)`.
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of those that the launch table has for the kernels with products.

    Returns the gradients in the shapes and the dtype of q, k and v, contiguous; 0 for rows that see no key. Raises
    ArgumentError, before any launch, for what does not fit.
    """
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do} | ({} if dlse is None else {"dlse": dlse})
    check_tensors("fa2_backward", **tensors)
    left, right = sides("fa2_backward", causal, window)
    return fa2_backward_op(
        q, k, v, o, lse, do, dlse, left, right, scale, deterministic, BLOCK_M, BLOCK_N, num_warps, num_stages
    )
