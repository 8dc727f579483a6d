"""FlashAttention's tile loops in numpy, rounding where the kernels do: what a catalogue of bugs is patched into.

Tensors are (batch, seqlen, heads, head_dim) as float64, LSE (batch, heads, seqlen). Sums and exponentials are fp32; P,
dS and results are rounded to `dtype`. Memory that nobody wrote is NaN, and stores have no bounds but their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashsim.numerics.fp8 import Blocks
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]
Tile = NDArray[np.float32]
LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
INF = np.float32(np.inf)
P_SCALE = np.float32(256)


def rounded(x: Tile, dtype: str) -> Tile:
    return round_to(x, dtype).astype(np.float32)


def load(tensor: Array, b: int, start: int, size: int, h: int) -> Tile:
    """Rows start .. start + size of one head, (size, head_dim); zeros beyond the end, as TMA and masked loads give."""
    tile = np.zeros((size, tensor.shape[3]), np.float32)
    rows = tensor[b, start : start + size, h]
    tile[: len(rows)] = rows
    return tile


def memory(*shape: int) -> Tile:
    return np.full(shape, np.nan, np.float32)


def visible(mask: str, rows: Array, cols: Array, seqlen_q: int, seqlen_k: int) -> NDArray[np.bool_]:
    """(rows, cols): which keys a row sees; the causal mask is aligned at the bottom right."""
    inside = np.broadcast_to(cols < seqlen_k, (len(rows), len(cols)))
    if mask == "causal":
        return inside & (cols <= rows[:, None] + seqlen_k - seqlen_q)
    return inside


def kv_tiles(mask: str, start_m: int, BLOCK_M: int, BLOCK_N: int, seqlen_q: int, seqlen_k: int) -> list[int]:
    """The KV tiles that some row of a Q tile sees, first to last."""
    stop = seqlen_k
    if mask == "causal":
        stop = min(stop, start_m + BLOCK_M + seqlen_k - seqlen_q)
    tiles = -(-stop // BLOCK_N)
    return list(range(tiles))


def forward(
    q: Array,
    k: Array,
    v: Array,
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    BLOCK_M: int = 16,
    BLOCK_N: int = 16,
    last_first: bool = False,
    scales: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array]:
    """O and LSE by FlashAttention-2's algorithm 1, with K and V in two slots each; `last_first` walks keys backwards.

    With `scales` (of Q, K, V; (batch, tiles, heads), one for each tile) the tensors are e4m3 codes, and P is e4m3, as
    in FlashAttention-3, section 3.3; O is in `dtype`.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    group = heads_q // heads_kv
    scale = np.float32(head_dim**-0.5 if scale is None else scale)
    out = memory(batch * seqlen_q + BLOCK_M, heads_q, head_dim_v)
    lse = memory(batch * heads_q * seqlen_q + BLOCK_M)
    # Q tiles slowest: the first tiles of all heads run before the last tiles of any.
    for start_m in range(0, seqlen_q, BLOCK_M):
        for b, h in np.ndindex(batch, heads_q):
            h_kv = h // group
            rows = start_m + np.arange(BLOCK_M)
            Q = load(q, b, start_m, BLOCK_M, h)
            m = np.full((BLOCK_M, 1), -INF)
            total = np.zeros((BLOCK_M, 1), np.float32)
            acc = np.zeros((BLOCK_M, head_dim_v), np.float32)
            tiles = kv_tiles(mask, start_m, BLOCK_M, BLOCK_N, seqlen_q, seqlen_k)
            if last_first:
                tiles = tiles[::-1]
            K_slots, V_slots = [memory(BLOCK_N, head_dim)] * 2, [memory(BLOCK_N, head_dim_v)] * 2
            if tiles:
                K_slots[0] = load(k, b, tiles[0] * BLOCK_N, BLOCK_N, h_kv)
                V_slots[0] = load(v, b, tiles[0] * BLOCK_N, BLOCK_N, h_kv)
            for n, j in enumerate(tiles):
                stage = n % 2
                for j_next in tiles[n + 1 : n + 2]:
                    K_slots[1 - stage] = load(k, b, j_next * BLOCK_N, BLOCK_N, h_kv)
                    V_slots[1 - stage] = load(v, b, j_next * BLOCK_N, BLOCK_N, h_kv)
                K, V = K_slots[stage], V_slots[stage]

                S = Q @ K.T
                if scales is not None:
                    S = S * np.float32(scales[0][b, start_m // BLOCK_M, h] * scales[1][b, j, h_kv])
                cols = j * BLOCK_N + np.arange(BLOCK_N)
                S = np.where(visible(mask, rows, cols, seqlen_q, seqlen_k), S, -INF)
                m_new = np.maximum(m, S.max(axis=1, keepdims=True))
                m_safe = np.where(m_new == -INF, np.float32(0), m_new)  # -inf - -inf is NaN
                P = np.exp2((S - m_safe) * (scale * LOG2E))
                alpha = np.exp2((m - m_safe) * (scale * LOG2E))
                total = total * alpha + P.sum(axis=1, keepdims=True)
                acc = acc * alpha
                if scales is None:
                    acc = acc + rounded(P, dtype) @ V
                else:
                    acc = acc + rounded(P * P_SCALE, "e4m3") @ V * np.float32(scales[2][b, j, h_kv])
                m = m_new

            seen = total > 0
            total = np.where(seen, total, np.float32(1))
            if scales is not None:
                acc = acc / P_SCALE
            Out = np.where(seen, acc / total, np.float32(0))
            L = np.where(seen, m * scale + np.log2(total) * LN2, -INF)
            inside = min(BLOCK_M, seqlen_q - start_m)
            at = b * seqlen_q + start_m
            out[at : at + inside, h] = rounded(Out[:inside], dtype)
            at = (b * heads_q + h) * seqlen_q + start_m
            lse[at : at + inside] = L[:inside, 0]
    o = out[: batch * seqlen_q].reshape(batch, seqlen_q, heads_q, head_dim_v)
    return o.astype(np.float64), lse[: batch * heads_q * seqlen_q].reshape(batch, heads_q, seqlen_q).astype(np.float64)


def forward_fp8(
    q: Blocks, k: Blocks, v: Blocks, dtype: str, mask: str, scale: float | None, last_first: bool
) -> tuple[Array, Array]:
    """`forward` of quantized tensors whose blocks are its tiles."""
    scales = (q.scales, k.scales, v.scales)
    return forward(q.codes, k.codes, v.codes, dtype, mask, scale, q.block, k.block, last_first, scales)


def backward(
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    do: Array,
    dtype: str,
    mask: str = "full",
    scale: float | None = None,
    BLOCK_M: int = 16,
    BLOCK_N: int = 16,
) -> tuple[Array, Array, Array]:
    """dQ, dK, dV by FlashAttention-2's algorithm 2; dQ is accumulated in fp32 over KV tiles, dK and dV over a group."""
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    group = heads_q // heads_kv
    scale = np.float32(head_dim**-0.5 if scale is None else scale)
    dq = np.zeros((batch, seqlen_q + BLOCK_M, heads_q, head_dim), np.float32)
    dk, dv = memory(batch, seqlen_k, heads_kv, head_dim), memory(batch, seqlen_k, heads_kv, head_dim_v)
    delta = np.sum(do.astype(np.float32) * o.astype(np.float32), axis=3)  # D, (batch, seqlen, heads)
    for b, h_kv in np.ndindex(batch, heads_kv):
        for j in range(-(-seqlen_k // BLOCK_N)):
            K, V = load(k, b, j * BLOCK_N, BLOCK_N, h_kv), load(v, b, j * BLOCK_N, BLOCK_N, h_kv)
            cols = j * BLOCK_N + np.arange(BLOCK_N)
            dK, dV = np.zeros_like(K), np.zeros_like(V)
            for h in range(h_kv * group, (h_kv + 1) * group):
                first = max(0, j * BLOCK_N - (seqlen_k - seqlen_q)) // BLOCK_M if mask == "causal" else 0
                for i in range(first, -(-seqlen_q // BLOCK_M)):
                    start_m = i * BLOCK_M
                    rows = start_m + np.arange(BLOCK_M)
                    Q, dO = load(q, b, start_m, BLOCK_M, h), load(do, b, start_m, BLOCK_M, h)
                    L = load(lse.transpose(0, 2, 1)[..., None], b, start_m, BLOCK_M, h)
                    D = load(delta[..., None], b, start_m, BLOCK_M, h)
                    L = np.where(L == -INF, INF, L)  # rows that see no key: exp(S - inf) = 0
                    S = np.where(visible(mask, rows, cols, seqlen_q, seqlen_k), Q @ K.T, -INF)
                    P = np.exp2(S * (scale * LOG2E) - L * LOG2E)
                    dV += rounded(P, dtype).T @ dO
                    dP = dO @ V.T
                    dS = rounded(P * (dP - D), dtype)
                    dK += dS.T @ Q
                    dq[b, start_m : start_m + BLOCK_M, h] += dS @ K
            inside = slice(j * BLOCK_N, min((j + 1) * BLOCK_N, seqlen_k))
            dk[b, inside, h_kv] = rounded(dK * scale, dtype)[: inside.stop - inside.start]
            dv[b, inside, h_kv] = rounded(dV, dtype)[: inside.stop - inside.start]
    dq = rounded(dq[:, :seqlen_q] * scale, dtype)
    return dq.astype(np.float64), dk.astype(np.float64), dv.astype(np.float64)
