"""FlashAttention-3, forward (Shah et al., arXiv 2407.08608), as far as plain Triton goes: TMA, and one of two overlaps.

All loads, and the store of O, go through tensor descriptors (TMA): zeros beyond the end of a sequence and of a row,
stores clipped, so that any length and head dim is right. The published kernel has two kinds of asynchrony at once; here
a launch has one of them, or none:

    intra_wg_overlap   algorithm 2: the softmax of a tile runs while O += P V of the tile before is on the tensor cores.
                       The compiler awaits Q K^T at once, since its result is used in the same step, and P V only in
                       the next step, since O is not touched before; this order is what gives the overlap.
    warp_specialized   algorithm 1: the compiler gives loads and products to warps of their own. On Hopper, one producer
                       and two consumers of 64 rows each, whose products are awaited; on Blackwell also the rescaling of
                       O (Triton's `tl.range(warp_specialize=True)`). There is no ping-pong.

`fa3.py` has both, for Hopper. Gradients are those of `fa2_backward`.
"""

import contextvars

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import (
    DTYPES,
    ArgumentError,
    architecture,
    check_attention,
    check_tensors,
    interpreted,
    launch_arguments,
    padded,
    sides,
)
from flashsim_kernels.fa2_backward import register_gradients
from flashsim_kernels.launch import launch_parameters

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Of fp32. Where m starts: a row that has seen no key yet has no -inf - -inf, and l stays 0."""
SMALLEST = 1.1754943508222875e-38
"""Normal number of fp32: stands for a scale of 0, which times -inf would be NaN."""


@triton.jit
def tensor_descriptors(
    Q, K, V, O,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, group,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of Q, K, V and O of this program's head, each a matrix of rows."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    V += b * stride_vb + (h // group).to(tl.int64) * stride_vh
    O += b * stride_ob + h.to(tl.int64) * stride_oh
    return (
        tl.make_tensor_descriptor(Q, [seqlen_q, D], [stride_qs, 1], [BLOCK_M, BLOCK_D]),
        tl.make_tensor_descriptor(K, [seqlen_k, D], [stride_ks, 1], [BLOCK_N, BLOCK_D]),
        tl.make_tensor_descriptor(V, [seqlen_k, D_V], [stride_vs, 1], [BLOCK_N, BLOCK_DV]),
        tl.make_tensor_descriptor(O, [seqlen_q, D_V], [stride_os, 1], [BLOCK_M, BLOCK_DV]),
    )


@triton.jit
def visible(start_m, seqlen_q, seqlen_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The number of KV tiles, the first key of those that some row does not see whole, and each row's last key."""
    last_key = tl.full([BLOCK_M], 0, tl.int32) + (seqlen_k - 1)
    tiles, whole = tl.cdiv(seqlen_k, BLOCK_N), seqlen_k // BLOCK_N
    if CAUSAL:
        beyond = seqlen_k - seqlen_q
        last_row = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1
        last_key = tl.minimum(start_m + tl.arange(0, BLOCK_M) + beyond, seqlen_k - 1)
        tiles = tl.minimum(tiles, tl.cdiv(tl.maximum(last_row + beyond + 1, 0), BLOCK_N))
        whole = tl.minimum(whole, tl.maximum(start_m + beyond + 1, 0) // BLOCK_N)
    return tiles, whole * BLOCK_N, last_key


@triton.jit
def masked(s, start_n, last_key, BLOCK_N: tl.constexpr):
    """s with -inf for the keys after each row's last one."""
    keys = start_n + tl.arange(0, BLOCK_N)
    return tl.where(keys[None, :] <= last_key[:, None], s, float("-inf"))


@triton.jit
def online_softmax(s, l, m, qk_scale):
    """P, the factor that O must be multiplied by, and the new l and m; qk_scale is log2(e) times the scale."""
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - m_new[:, None])  # one FFMA and one EX2 an element
    alpha = tl.exp2(m - m_new)
    return p, alpha, l * alpha + tl.sum(p, 1), m_new


@triton.jit
def write(desc_o, LSE, acc, l, m, start_m, seqlen_q, heads, BLOCK_M: tl.constexpr):
    """Algorithm 1, lines 24 and 25. A row without keys: O is 0, LSE is -inf."""
    divisor = tl.where(l == 0.0, 1.0, l)
    desc_o.store([start_m, 0], (acc / divisor[:, None]).to(desc_o.dtype))
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(divisor)) * LN2)
    rows = start_m + tl.arange(0, BLOCK_M)
    LSE += (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * seqlen_q
    tl.store(LSE + rows, lse, mask=rows < seqlen_q)


@triton.jit
def fa3_triton_fwd_overlap(
    Q, K, V, O, LSE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, heads, group,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Algorithm 2 for BLOCK_M queries of one head. Tiles come from the last to the first, so that j - 1 in the paper is
    the tile after j here; a causal mask's longest programs start first."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    desc_q, desc_k, desc_v, desc_o = tensor_descriptors(
        Q, K, V, O, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
        stride_ob, stride_os, stride_oh, seqlen_q, seqlen_k, group, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tiles, first_masked, last_key = visible(start_m, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    last = tl.maximum(tiles - 1, 0)  # rows that see no key at all go through the first tile, masked

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    q = desc_q.load([start_m, 0])  # 3
    s = tl.dot(q, desc_k.load([last * BLOCK_N, 0]).T)  # 4
    s = masked(s, last * BLOCK_N, last_key, BLOCK_N)
    p, alpha, l, m = online_softmax(s, l, m, qk_scale)  # 6
    for i in tl.range(0, last):  # 7
        start_n = (last - 1 - i) * BLOCK_N
        s = tl.dot(q, desc_k.load([start_n, 0]).T)  # 8, 9; what is awaited here is this, and line 11 of the step before
        v = desc_v.load([start_n + BLOCK_N, 0])  # 10
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])  # 11, after line 14 of the step before
        # ptxas issues all products of line 11 before this branch; without one, it would put the exponentials of line 13
        # between them. That is why the branch is there even where no tile but the last is masked.
        if start_n >= first_masked:
            s = masked(s, start_n, last_key, BLOCK_N)
        p, alpha, l, m = online_softmax(s, l, m, qk_scale)  # 13, under line 11
    v = desc_v.load([0, 0])  # 18
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])  # 19
    write(desc_o, LSE, acc, l, m, start_m, seqlen_q, heads, BLOCK_M)


@triton.jit
def fa3_triton_fwd(
    Q, K, V, O, LSE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, heads, group,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, WARP_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 for BLOCK_M queries of one head; RAGGED: seqlen_k is no multiple of BLOCK_N.

    One loop, and every tile masked if one must be: a second loop, or a branch, and the compiler does not specialize.
    """
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    desc_q, desc_k, desc_v, desc_o = tensor_descriptors(
        Q, K, V, O, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
        stride_ob, stride_os, stride_oh, seqlen_q, seqlen_k, group, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tiles, _, last_key = visible(start_m, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    q = desc_q.load([start_m, 0])  # 5, 14
    for start_n in tl.range(0, tiles * BLOCK_N, BLOCK_N, warp_specialize=WARP_SPECIALIZED):  # 6, 15
        s = tl.dot(q, desc_k.load([start_n, 0]).T)  # 8 for K; 16, 17
        if CAUSAL or RAGGED:
            s = masked(s, start_n, last_key, BLOCK_N)
        p, alpha, l, m = online_softmax(s, l, m, qk_scale)  # 18, 19
        v = desc_v.load([start_n, 0])  # 8 for V; 20
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])  # 21
    write(desc_o, LSE, acc, l, m, start_m, seqlen_q, heads, BLOCK_M)


def in_scratch_context(launch) -> None:
    """Launch a kernel that makes tensor descriptors, which lie in global memory that Triton asks an allocator for.

    An allocator is set for the current context only: in a copy of it, so that the caller's own stays as it is.
    """

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launch()

    contextvars.copy_context().run(run)


def row_stride(x: torch.Tensor) -> int:
    """Of a descriptor, which needs a multiple of 16 bytes even where there is one row and any would do."""
    return x.stride(1) if x.shape[1] > 1 else 16


def chosen_kernel(
    q: torch.Tensor, v: torch.Tensor, warp_specialized: bool | None, intra_wg_overlap: bool | None
) -> tuple[bool, bool, str]:
    """Whether it is specialized, whether it overlaps, and the launch table's name for its parameters."""
    if warp_specialized and intra_wg_overlap:
        raise ArgumentError(
            ["fa3_triton: warp_specialized, intra_wg_overlap: both True, at most one may be: specialized by Triton, "
             "warps await their products; fa3 has both"]
        )  # fmt: skip
    default = launch_parameters(
        "triton", "fa3_triton_fwd", architecture(q.device), DTYPES[q.dtype], max(q.shape[3], v.shape[3])
    )
    usual = bool(default["warp_specialized"]), bool(default["intra_wg_overlap"])
    specialized = usual[0] and not intra_wg_overlap if warp_specialized is None else warp_specialized
    overlap = usual[1] and not warp_specialized if intra_wg_overlap is None else intra_wg_overlap
    if (specialized, overlap) == usual:
        return specialized, overlap, "fa3_triton_fwd"
    return (
        specialized,
        overlap,
        f"fa3_triton_fwd_{'specialized' if specialized else 'overlap' if overlap else 'awaited'}",
    )


def check_specialized(arch: str, BLOCK_M: int, num_warps: int) -> None:
    """Raise ArgumentError for what the compiler ignores silently, or makes wrong code of.

    On Hopper both consumers would compute the same 64 rows if BLOCK_M were 64, and with 8 warps there are none.
    """
    allowed = {"hopper": ((128,), (4,)), "blackwell": ((64, 128), (4, 8))}[arch]
    wrong = [
        f"fa3_triton: {parameter}: got {value}, warp_specialized needs {' or '.join(map(str, some))} on {arch}"
        for parameter, value, some in zip(("BLOCK_M", "num_warps"), (BLOCK_M, num_warps), allowed, strict=True)
        if value not in some
    ]
    if wrong:
        raise ArgumentError(wrong)


def launch_fa3_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    warp_specialized: bool | None,
    intra_wg_overlap: bool | None,
    **overrides: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches."""
    check_attention(
        "fa3_triton", q, k, v, dtypes=(torch.float16, torch.bfloat16), least_capability=90, most_capability=103,
        aligned=True, scale=scale,
    )  # fmt: skip
    specialized, overlap, table = chosen_kernel(q, v, warp_specialized, intra_wg_overlap)
    launch = launch_arguments("fa3_triton", table, q, v, overrides)
    launch = {name: value for name, value in launch.items() if name not in ("warp_specialized", "intra_wg_overlap")}
    if specialized and not interpreted():
        check_specialized(architecture(q.device), launch["BLOCK_M"], launch["num_warps"])
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if seqlen_k == 0:  # TMA has no empty tensors
        return o.zero_(), lse.fill_(float("-inf"))
    if not (batch and seqlen_q and heads):
        return o, lse
    strides = [stride for x in (q, k, v, o) for stride in (x.stride(0), row_stride(x), x.stride(2))]
    qk_scale = max((d**-0.5 if scale is None else scale) * LOG2E, SMALLEST)
    arguments = (q, k, v, o, lse, *strides, seqlen_q, seqlen_k, heads, heads // heads_kv, qk_scale)
    sizes = {"D": d, "D_V": d_v, "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v), "CAUSAL": causal}
    grid = (triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch)
    with torch.cuda.device_of(q):
        if overlap:
            in_scratch_context(lambda: fa3_triton_fwd_overlap[grid](*arguments, **sizes, **launch))
        else:
            sizes |= {"RAGGED": seqlen_k % launch["BLOCK_N"] > 0, "WARP_SPECIALIZED": specialized}
            in_scratch_context(lambda: fa3_triton_fwd[grid](*arguments, **sizes, **launch))
    return o, lse


@torch.library.custom_op("flashsim_kernels::fa3_triton", mutates_args=())
def fa3_triton_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    warp_specialized: bool | None,
    intra_wg_overlap: bool | None,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if left is not None or right not in (None, 0):
        raise ArgumentError(
            [f"fa3_triton: left, right: got {left}, {right}, allowed are None, and 0 for right (causal)"]
        )
    return launch_fa3_triton(
        q, k, v, right == 0, scale, warp_specialized, intra_wg_overlap,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@fa3_triton_op.register_fake
def _(q, k, v, left, right, scale, deterministic, warp_specialized, intra_wg_overlap, *launch):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(fa3_triton_op)


def fa3_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    warp_specialized: bool | None = None,
    intra_wg_overlap: bool | None = None,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V, and with `return_lse` the logarithm of the sum of exponentials of each row.

    q: (batch, seqlen_q, heads, head_dim), fp16 or bf16; k: (batch, seqlen_k, heads_kv, head_dim), v: (batch, seqlen_k,
    heads_kv, head_dim_v), of the same dtype. heads_kv divides heads: query head h reads KV head
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. The last stride is 1; all others,
    and the first elements, lie at multiples of 16 bytes.

    causal: row i sees key c if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    scale: by default head_dim ** -0.5; not negative.
    deterministic: of the gradients, see `fa2_backward`.
    warp_specialized, intra_wg_overlap: see above; at most one of them. By default what the launch table has for the
        GPU: overlap on Hopper, specialized on Blackwell up to head dim 128.
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of those that the launch table has for the GPU and head dim. On
        Hopper, warp_specialized needs BLOCK_M = 128 and num_warps = 4.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    For sm_90 to sm_103. Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("fa3_triton", q=q, k=k, v=v)
    left, right = sides("fa3_triton", causal, None)
    o, lse = fa3_triton_op(
        q, k, v, left, right, scale, deterministic, warp_specialized, intra_wg_overlap,
        BLOCK_M, BLOCK_N, num_warps, num_stages,
    )  # fmt: skip
    return (o, lse) if return_lse else o
