"""Quantization to FP8 (e4m3) with a scale for each block of rows, and Hadamard transform, for `fa3_fp8`.

FlashAttention-3 (Shah et al., arXiv 2407.08608), section 3.3. The transform (incoherent processing) multiplies Q and K
by a Hadamard matrix with random signs, which leaves Q K^T as it is and spreads outliers over their rows. Transform,
maximum, scale and rounding are one pass over memory.
"""

import torch
import triton
import triton.language as tl

from flashsim_kernels.arguments import ArgumentError, check_attention, check_tensors, launch_arguments, padded

LARGEST = tl.constexpr(448.0)
"""Of e4m3."""
LEAST_SCALE = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal number of fp32."""
TMA_ROW = 16
"""Elements of 8 bits that rows in memory are multiples of."""
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@triton.jit
def hadamard(x, seed, factor, BLOCK: tl.constexpr, D: tl.constexpr, LOG2_D: tl.constexpr):
    """x diag(signs) H times factor, H[i, j] = (-1) ** popcount(i & j) (Sylvester's): log2(D) steps of D sums each."""
    signs = 1 - 2 * (tl.randint(seed, tl.arange(0, D)).to(tl.int32) & 1)
    x = x.to(tl.float32) * (signs * factor)[None, :]
    for i in tl.static_range(LOG2_D):  # columns that differ in bit i
        a, b = tl.split(tl.permute(tl.reshape(x, [BLOCK, D >> (i + 1), 2, 1 << i]), (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [BLOCK, D])
    return x


@triton.jit
def quantize_fp8_rows(
    X, CODES, SCALE,
    stride_xb, stride_xs, stride_xh,
    stride_cb, stride_cs, stride_ch, stride_cd,
    seqlen, heads, seed, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_D: tl.constexpr, BLOCK: tl.constexpr,
    INCOHERENT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One program for each BLOCK rows of each head: their codes, and their scale, (batch, blocks, heads)."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = block.to(tl.int64) * BLOCK
    rows, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_row = start + rows < seqlen
    X += b * stride_xb + start * stride_xs + h.to(tl.int64) * stride_xh
    x = tl.load(X + rows[:, None] * stride_xs + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    x = hadamard(x, seed, factor, BLOCK, BLOCK_D, LOG2_D) if INCOHERENT else x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x)), LARGEST)
    scale = tl.where(scale < LEAST_SCALE, 1.0, scale)  # of zeros, and of what fp32 has no scale for
    codes = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -LARGEST, LARGEST).to(CODES.dtype.element_ty)
    CODES += b * stride_cb + start * stride_cs + h.to(tl.int64) * stride_ch
    if TRANSPOSED:
        at = CODES + d[:, None].to(tl.int64) * stride_cd + rows[None, :]
        tl.store(at, tl.trans(codes), mask=(d < D)[:, None] & is_row[None, :])
    else:
        is_column = d < (BLOCK_D if INCOHERENT else D)
        tl.store(CODES + rows[:, None] * stride_cs + d[None, :], codes, mask=is_row[:, None] & is_column[None, :])
    tl.store(SCALE + (b * tl.num_programs(0) + block) * heads + h, scale)


def quantize_fp8(
    x: torch.Tensor, block: int, *, incoherent: bool = False, seed: int = 0, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch, seqlen, heads, head_dim), fp16 or bf16, in e4m3 with a scale for each `block` rows of a head.

    Returns codes (batch, seqlen, heads, head_dim) and scale (batch, ceil(seqlen / block), heads), fp32: x is their
    product, rounded. The scale is max|x| / 448; 1 for zeros.

    block: a power of two from 16 to 256.
    incoherent: what is quantized is x diag(signs) H / sqrt(D'), with a Hadamard matrix H of D' columns, head_dim's next
        power of two; codes have D' columns. Products of two such tensors are those of what was given.
    seed: of the signs, which depend on nothing else.
    transposed: codes are stored with consecutive rows side by side, strides (..., 1, ..., ...): for V.

    Codes lie at multiples of 16 bytes. Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("quantize_fp8", x=x)
    check_attention("quantize_fp8", x, x, x, dtypes=SIXTEEN_BITS, least_capability=90, most_capability=103)
    if not 16 <= block <= 256 or block & (block - 1):
        raise ArgumentError([f"quantize_fp8: block: got {block}, allowed are the powers of two from 16 to 256"])
    if incoherent and transposed:
        raise ArgumentError(
            ["quantize_fp8: incoherent, transposed: both True, V is not multiplied by a Hadamard matrix"]
        )
    return launch_quantize(x, block, incoherent, seed, transposed)


def launch_quantize(
    x: torch.Tensor, block: int, incoherent: bool, seed: int, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, seqlen, heads, d), block_d = x.shape, padded(x.shape[3])
    columns = block_d if incoherent else d
    if transposed:
        codes = torch.empty(batch, heads, d, round_up(seqlen), dtype=torch.float8_e4m3fn, device=x.device)
        codes = codes[..., :seqlen].permute(0, 3, 1, 2)
    else:
        codes = torch.empty(batch, seqlen, heads, round_up(columns), dtype=torch.float8_e4m3fn, device=x.device)
        codes = codes[..., :columns]
    blocks = triton.cdiv(seqlen, block)
    scale = torch.empty(batch, blocks, heads, dtype=torch.float32, device=x.device)
    if x.numel():
        launch = launch_arguments("quantize_fp8", "quantize_fp8_rows", x, x, {})
        with torch.cuda.device_of(x):
            quantize_fp8_rows[blocks, heads, batch](
                x, codes, scale, *x.stride()[:3], *codes.stride(), seqlen, heads, seed, block_d**-0.5,
                D=d, BLOCK_D=block_d, LOG2_D=block_d.bit_length() - 1, BLOCK=block,
                INCOHERENT=incoherent, TRANSPOSED=transposed, **launch,
            )  # fmt: skip
    return codes, scale


def round_up(elements: int) -> int:
    return -(-elements // TMA_ROW) * TMA_ROW
