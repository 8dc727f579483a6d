"""FlashAttention-3 in FP8 (e4m3), forward (Shah et al., arXiv 2407.08608, section 3.3), in Triton.

Each block of rows of Q, K and V has a scale of its own (block quantization); Q and K may be multiplied by a Hadamard
matrix before (incoherent processing): `quantize_fp8`, which writes V transposed. The tensor cores of Hopper take FP8
operands along k only; the published kernel, given V as it is, transposes each tile inside.

The loop is FlashAttention-2's through tensor descriptors, every product awaited: ptxas runs asynchronous ones of 8 bits
one by one, so that `fa3_triton`'s overlap would be lost. P <= 1 is 256 times as large when it is rounded. P V of a tile
is multiplied by V's scale and added to O in fp32, outside of the tensor cores, which on Hopper keep fewer bits of a sum
of FP8 products. There are no gradients.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import ArgumentError, check_attention, check_tensors, launch_arguments, padded
from flashsim_kernels.fa3_triton import LN2, LOG2E, LOWEST, in_scratch_context, masked, row_stride, visible
from flashsim_kernels.quantize_fp8 import LEAST_SCALE, SIXTEEN_BITS, TMA_ROW, launch_quantize

P_LOG2 = tl.constexpr(8.0)
"""P is scaled by 2**8 (`Max_offset` in hopper/softmax.h), so that small probabilities are numbers of e4m3."""
LEAST_K = 32
"""Of a product in 8 bits."""
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def fa3_fp8_fwd(
    Q, K, V, O, LSE, Q_SCALE, K_SCALE, V_SCALE,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_qsb, stride_qss, stride_qsh,
    stride_ksb, stride_kss, stride_ksh,
    stride_vsb, stride_vss, stride_vsh,
    seqlen_q, seqlen_k, heads, group, q_block, k_block,
    qk_scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. A scale is for q_block rows of Q, or k_block of K and V: multiples of the tile's."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = (h // group).to(tl.int64)
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + kv_head * stride_kh
    V += b * stride_vb + kv_head * stride_vh
    O += b * stride_ob + h.to(tl.int64) * stride_oh
    Q_SCALE += b * stride_qsb + h.to(tl.int64) * stride_qsh
    K_SCALE += b * stride_ksb + kv_head * stride_ksh
    V_SCALE += b * stride_vsb + kv_head * stride_vsh
    desc_q = tl.make_tensor_descriptor(Q, [seqlen_q, D], [stride_qs, 1], [BLOCK_M, BLOCK_D])
    desc_k = tl.make_tensor_descriptor(K, [seqlen_k, D], [stride_ks, 1], [BLOCK_N, BLOCK_D])
    if TRANSPOSED:
        desc_v = tl.make_tensor_descriptor(V, [D_V, seqlen_k], [stride_vs, 1], [BLOCK_DV, BLOCK_N])
    else:
        desc_v = tl.make_tensor_descriptor(V, [seqlen_k, D_V], [stride_vs, 1], [BLOCK_N, BLOCK_DV])
    desc_o = tl.make_tensor_descriptor(O, [seqlen_q, D_V], [stride_os, 1], [BLOCK_M, BLOCK_DV])
    tiles, first_masked, last_key = visible(start_m, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    q = desc_q.load([start_m, 0])
    q_scale = tl.load(Q_SCALE + start_m // q_block * stride_qss) * qk_scale
    for start_n in tl.range(0, tiles * BLOCK_N, BLOCK_N):
        block = start_n // k_block
        s = tl.dot(q, desc_k.load([start_n, 0]).T)
        # The scale of S is positive, so that -inf stays -inf.
        s_scale = tl.maximum(q_scale * tl.load(K_SCALE + block * stride_kss), LEAST_SCALE)
        if start_n >= first_masked:
            s = masked(s, start_n, last_key, BLOCK_N)
        m_new = tl.maximum(m, tl.max(s, 1) * s_scale)
        p = tl.exp2(s * s_scale - (m_new - P_LOG2)[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)  # of what is not rounded
        m = m_new
        v = desc_v.load([0, start_n]).T if TRANSPOSED else desc_v.load([start_n, 0])
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v) * tl.load(V_SCALE + block * stride_vss)

    divisor = tl.where(l == 0.0, 1.0, l)
    desc_o.store([start_m, 0], (acc / divisor[:, None]).to(O.dtype.element_ty))
    lse = tl.where(l == 0.0, float("-inf"), (m + (tl.log2(divisor) - P_LOG2)) * LN2)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(LSE + (b * heads + h) * seqlen_q + rows, lse, mask=rows < seqlen_q)


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    blocks: tuple[int, int],
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
    launch: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tensors that are quantized; `blocks`: rows of Q, and of K and V, that a scale is for."""
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if seqlen_k == 0:  # TMA has no empty tensors
        return o.zero_(), lse.fill_(float("-inf"))
    if not (batch and seqlen_q and heads):
        return o, lse
    transposed = v.stride(3) != 1
    rows = row_stride(q), row_stride(k), v.stride(3) if transposed else row_stride(v), row_stride(o)
    strides = [n for x, row in zip((q, k, v, o), rows, strict=True) for n in (x.stride(0), row, x.stride(2))]
    grid = (triton.cdiv(seqlen_q, launch["BLOCK_M"]), heads, batch)
    with torch.cuda.device_of(q):
        in_scratch_context(
            lambda: fa3_fp8_fwd[grid](
                q, k, v, o, lse, *scales, *strides, *(n for x in scales for n in x.stride()),
                seqlen_q, seqlen_k, heads, heads // heads_kv, *blocks, scale * LOG2E,
                D=d, D_V=d_v, BLOCK_D=max(LEAST_K, padded(d)), BLOCK_DV=padded(d_v), CAUSAL=causal,
                TRANSPOSED=transposed, **launch,
            )
        )  # fmt: skip
    return o, lse


def launch_parameters_of(
    name: str, q: torch.Tensor, v: torch.Tensor, out_dtype: torch.dtype, overrides: dict[str, int | None]
) -> dict[str, int]:
    """Raises ArgumentError."""
    launch = launch_arguments(name, "fa3_fp8_fwd", q, v, overrides)
    wrong = []
    if launch["BLOCK_N"] < LEAST_K:
        wrong.append(f"{name}: BLOCK_N: got {launch['BLOCK_N']}, must be at least {LEAST_K}, k of a product in 8 bits")
    if out_dtype not in OUTPUTS:
        wrong.append(f"{name}: out_dtype: got {out_dtype}, allowed are {', '.join(map(str, OUTPUTS))}")
    if wrong:
        raise ArgumentError(wrong)
    return launch


@torch.library.custom_op("flashsim_kernels::fa3_fp8", mutates_args=())
def fa3_fp8_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    incoherent: bool,
    seed: int,
    out_dtype: torch.dtype,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_attention(
        "fa3_fp8", q, k, v, dtypes=SIXTEEN_BITS, least_capability=90, most_capability=103, scale=scale
    )  # fmt: skip
    overrides = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    launch = launch_parameters_of("fa3_fp8", q, v, out_dtype, overrides)
    blocks = launch["BLOCK_M"], launch["BLOCK_N"]
    q8, q_scale = launch_quantize(q, blocks[0], incoherent, seed, False)
    k8, k_scale = launch_quantize(k, blocks[1], incoherent, seed, False)
    v8, v_scale = launch_quantize(v, blocks[1], False, seed, True)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return launch_attention(q8, k8, v8, (q_scale, k_scale, v_scale), blocks, causal, scale, out_dtype, launch)


@torch.library.custom_op("flashsim_kernels::fa3_fp8_quantized", mutates_args=())
def fa3_fp8_quantized_op(
    q8: torch.Tensor,
    k8: torch.Tensor,
    v8: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    q_block: int,
    k_block: int,
    causal: bool,
    scale: float | None,
    out_dtype: torch.dtype,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
    num_warps: int | None,
    num_stages: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    name, transposed = "fa3_fp8_quantized", v8.ndim == 4 and v8.stride(3) != 1 and v8.stride(1) == 1
    # Of V, whose rows need not be contiguous, the rest is asked.
    as_rows = v8.new_empty(1, 1, 1, v8.shape[3]).expand(v8.shape) if transposed else v8
    check_attention(
        name, q8, k8, as_rows, dtypes=(torch.float8_e4m3fn,), least_capability=90, most_capability=103,
        aligned=True, scale=scale,
    )  # fmt: skip
    overrides = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    launch = launch_parameters_of(name, q8, v8, out_dtype, overrides)
    wrong = []
    if transposed and any(stride % TMA_ROW for stride in (v8.stride(0), *v8.stride()[2:])):
        wrong.append(f"v8: strides {v8.stride()}, all but seqlen's must be multiples of {TMA_ROW}")
    for arg, block, tile in (("q_block", q_block, "BLOCK_M"), ("k_block", k_block, "BLOCK_N")):
        if block < 1 or block % launch[tile]:
            wrong.append(f"{arg}: got {block}, must be a multiple of {tile}, {launch[tile]}")
    scales = {"q_scale": (q_scale, q8, q_block), "k_scale": (k_scale, k8, k_block), "v_scale": (v_scale, v8, k_block)}
    for arg, (x, of, block) in scales.items():
        needed = (of.shape[0], triton.cdiv(of.shape[1], max(block, 1)), of.shape[2]), torch.float32, of.device
        if (tuple(x.shape), x.dtype, x.device) != needed:
            got = f"shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
            wrong.append(f"{arg}: {got}, must be {needed[0]}, {needed[1]}, on {needed[2]}")
    if wrong:
        raise ArgumentError([f"{name}: {line}" for line in wrong])
    scale = q8.shape[3] ** -0.5 if scale is None else scale
    blocks = q_block, k_block
    return launch_attention(q8, k8, v8, (q_scale, k_scale, v_scale), blocks, causal, scale, out_dtype, launch)


def _outputs(q, v, out_dtype):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=out_dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


@fa3_fp8_op.register_fake
def _(q, k, v, causal, scale, incoherent, seed, out_dtype, *launch):
    return _outputs(q, v, out_dtype)


@fa3_fp8_quantized_op.register_fake
def _(q8, k8, v8, q_scale, k_scale, v_scale, q_block, k_block, causal, scale, out_dtype, *launch):
    return _outputs(q8, v8, out_dtype)


def _no_gradients(ctx, *gradients):
    raise NotImplementedError("fa3_fp8 has no backward pass; fa2, fa3 and fa3_triton have one, in 16 bits")


fa3_fp8_op.register_autograd(_no_gradients)
fa3_fp8_quantized_op.register_autograd(_no_gradients)


def fa3_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    incoherent: bool = True,
    seed: int = 0,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V of Q, K and V rounded to FP8, and with `return_lse` each row's log-sum-exp.

    q: (batch, seqlen_q, heads, head_dim), fp16 or bf16; k: (batch, seqlen_k, heads_kv, head_dim), v: (batch, seqlen_k,
    heads_kv, head_dim_v), of the same dtype. heads_kv divides heads: query head h reads KV head
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. Any strides, the last being 1.

    causal: row i sees key c if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    scale: by default head_dim ** -0.5.
    incoherent, seed: see `quantize_fp8`. A scale is for BLOCK_M rows of Q, and BLOCK_N rows of K and V.
    out_dtype: bf16, fp16 or fp32.
    BLOCK_M, BLOCK_N, num_warps, num_stages: in place of those that the launch table has for the GPU and head dim;
        BLOCK_N from 32.

    Returns O (batch, seqlen_q, heads, head_dim_v) and LSE (batch, heads, seqlen_q), fp32, natural logarithm. A row
    without keys has O = 0 and LSE = -inf. There are no gradients: NotImplementedError where they are asked for.

    For sm_90 to sm_103. Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("fa3_fp8", q=q, k=k, v=v)
    o, lse = fa3_fp8_op(
        q, k, v, causal, scale, incoherent, seed, out_dtype, BLOCK_M, BLOCK_N, num_warps, num_stages
    )  # fmt: skip
    return (o, lse) if return_lse else o


def fa3_fp8_quantized(
    q8: torch.Tensor,
    k8: torch.Tensor,
    v8: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    q_block: int,
    k_block: int,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`fa3_fp8` of tensors that are quantized already, such as `quantize_fp8` returns them.

    q8, k8, v8: shapes as there, e4m3. q_scale: (batch, ceil(seqlen_q / q_block), heads), k_scale and v_scale: (batch,
    ceil(seqlen_k / k_block), heads_kv), fp32, not negative.
    q_block, k_block: rows that a scale is for, multiples of BLOCK_M and of BLOCK_N.
    The last stride of q8 and k8 is 1; of v8 either the last (then the kernel transposes its tiles) or that of seqlen_k.
    All other strides, and the first elements, lie at multiples of 16 bytes. `scale` by default: q8's head_dim ** -0.5.

    Returns, and raises, what `fa3_fp8` does.
    """
    tensors = {"q8": q8, "k8": k8, "v8": v8, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    check_tensors("fa3_fp8_quantized", **tensors)
    o, lse = fa3_fp8_quantized_op(
        *tensors.values(), q_block, k_block, causal, scale, out_dtype, BLOCK_M, BLOCK_N, num_warps, num_stages
    )
    return (o, lse) if return_lse else o
