"""FlashAttention-2, forward (Dao, arXiv 2307.08691, algorithm 1); `fa2_backward` has the backward pass.

One program for each block of queries, an inner loop over the K/V tiles that the block sees, in ascending order. Tiles
of which every query sees every key have a loop of their own, without masks: first come those that a window cuts on its
left, then whole ones, then those that the diagonal, a window's right side or the end of the keys cuts.

    python -m flashsim_kernels.fa2

computes a small case, without a GPU in Triton's interpreter, and prints the error.
"""

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import triton
import triton.language as tl

from flashsim_kernels.arguments import check_attention, check_tensors, launch_arguments, padded, sides
from flashsim_kernels.fa2_backward import register_gradients

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
def attend(
    acc, l, m, q, rows,
    K, V,
    stride_ks, stride_vs,
    begin, end, seqlen_k,
    first_seen, last_seen,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Algorithm 1, lines 6 to 11, over the keys from `begin` to `end`. Row i sees those from i + first_seen (if LEFT)
    to i + last_seen (if RIGHT)."""
    for j in tl.range(begin, end, BLOCK_N):  # 6
        k = load_rows(K, j, seqlen_k, stride_ks, BLOCK_N, D, BLOCK_D, MASKED)  # 7
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # 8: S = Q K_j^T
        if MASKED:
            keys = j + tl.arange(0, BLOCK_N)
            seen = keys[None, :] < seqlen_k
            if LEFT:
                seen = seen & (keys[None, :] >= rows[:, None] + first_seen)
            if RIGHT:
                seen = seen & (keys[None, :] <= rows[:, None] + last_seen)
            s = tl.where(seen, s * qk_scale, float("-inf"))
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
def fa2_fwd(
    Q, K, V, O, LSE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, heads, group,
    left, right,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 for BLOCK_M queries of one head; qk_scale is log2(e) times the scale."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)  # 3
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    V += b * stride_vb + (h // group).to(tl.int64) * stride_vh
    O += b * stride_ob + h.to(tl.int64) * stride_oh
    LSE += (b * heads + h) * seqlen_q

    # The keys that some row sees, from the tile that the first of them lies in, and the tiles that all rows see whole.
    last = tl.minimum(start + BLOCK_M, seqlen_q) - 1
    first_seen, last_seen = seqlen_k - seqlen_q - left, seqlen_k - seqlen_q + right
    begin, whole_end, end = 0, seqlen_k, seqlen_k
    if RIGHT:
        whole_end = tl.minimum(tl.maximum(start + last_seen + 1, 0), seqlen_k)
        end = tl.minimum(tl.maximum(last + last_seen + 1, 0), seqlen_k)
    whole = begin
    if LEFT:
        begin = tl.maximum(start + first_seen, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(last + first_seen, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_end = tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole)

    rows = start + tl.arange(0, BLOCK_M)
    q = load_rows(Q, start, seqlen_q, stride_qs, BLOCK_M, D, BLOCK_D, True)  # 4
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # 5
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if LEFT:
        acc, l, m = attend(
            acc, l, m, q, rows, K, V, stride_ks, stride_vs, begin, whole, seqlen_k, first_seen, last_seen, qk_scale,
            D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, True,
        )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, rows, K, V, stride_ks, stride_vs, whole, whole_end, seqlen_k, first_seen, last_seen, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, False,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, rows, K, V, stride_ks, stride_vs, whole_end, end, seqlen_k, first_seen, last_seen, qk_scale,
        D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, True,
    )  # fmt: skip

    # A row without keys: O is 0, LSE is -inf.
    o = acc / tl.where(m == float("-inf"), 1.0, l)[:, None]  # 12
    lse = (m + tl.log2(tl.where(m == float("-inf"), 1.0, l))) * LN2  # 13
    columns = tl.arange(0, BLOCK_DV)
    at = O + start.to(tl.int64) * stride_os + (rows - start)[:, None] * stride_os + columns[None, :]
    tl.store(at, o.to(O.dtype.element_ty), mask=(rows < seqlen_q)[:, None] & (columns < D_V)[None, :])  # 14
    tl.store(LSE + rows, lse, mask=rows < seqlen_q)  # 15


def launch_fa2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches. A query sees `left` keys before its own and `right` after it; None: all."""
    check_attention("fa2", q, k, v, scale=scale)
    launch = launch_arguments("fa2", "fa2_fwd", q, v, overrides)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if batch and seqlen_q:
        grid = (triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch)
        with torch.cuda.device_of(q):
            fa2_fwd[grid](
                q, k, v, o, lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
                seqlen_q, seqlen_k, heads, heads // heads_kv,
                left or 0, right or 0,
                (d**-0.5 if scale is None else scale) * LOG2E,
                D=d, D_V=d_v, BLOCK_D=padded(d), BLOCK_DV=padded(d_v),
                LEFT=left is not None, RIGHT=right is not None,
                **launch,
            )  # fmt: skip
    return o, lse


@torch.library.custom_op("flashsim_kernels::fa2", mutates_args=())
def fa2_op(
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
    return launch_fa2(
        q, k, v, left, right, scale, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages
    )


@fa2_op.register_fake
def _(q, k, v, left, right, scale, deterministic, BLOCK_M, BLOCK_N, num_warps, num_stages):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(fa2_op)


def fa2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
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
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. Any strides, the last 1.

    causal: row i sees key c if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    window: (L, R); row i sees key c if i + seqlen_k - seqlen_q - L <= c <= i + seqlen_k - seqlen_q + R; None for a
        side: no end there. With `causal`, R is at most 0.
    scale: by default head_dim ** -0.5.
    deterministic: of the gradients, see `fa2_backward`.
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of those that the launch table has for GPU, dtype and head dim.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    fp32 products are exact fp32 (no TF32). Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("fa2", q=q, k=k, v=v)
    left, right = sides("fa2", causal, window)
    o, lse = fa2_op(q, k, v, left, right, scale, deterministic, BLOCK_M, BLOCK_N, num_warps, num_stages)
    return (o, lse) if return_lse else o


def mend_interpreter() -> None:
    """Triton 3.6's interpreter takes no bound of a loop that is known at run time only, with NumPy 2.4 and later."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def main() -> None:
    """A small case, against attention in float64."""
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    if device == "cpu" and triton.__version__.startswith("3.6."):
        mend_interpreter()
    torch.manual_seed(0)
    q = torch.randn(1, 100, 4, 64, dtype=torch.float16, device=device)
    k, v = (torch.randn(1, 150, 2, 64, dtype=torch.float16, device=device) for _ in range(2))
    o, lse = fa2(q, k, v, causal=True, return_lse=True)
    q, k, v = (x.double().repeat_interleave(4 // x.shape[2], dim=2).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * 64**-0.5
    seen = torch.ones(100, 150, dtype=torch.bool, device=device).tril(150 - 100)
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(3) @ v).transpose(1, 2)
    where = "Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
    print(f"fa2 in {where}: q {tuple(o.shape)}, 150 keys, 2 KV heads, causal, fp16, against float64")  # noqa: T201
    print(f"largest error of O    {(o - expected).abs().max().item():.1e}")  # noqa: T201
    print(f"largest error of LSE  {(lse - scores.logsumexp(3)).abs().max().item():.1e}")  # noqa: T201


if __name__ == "__main__":
    main()
