"""Small kernels for tests of the compilation and the audit: what a kernel of this project does, or does wrong."""

from __future__ import annotations

import os
import time

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@triton.jit
def attention_kernel(
    Q, K, V, Out, qk_scale, seqlen_k,
    D: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole tiles only, contiguous (seqlen, D) of each head."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q = tl.load(Q + rows[:, None] * D + columns[None, :])
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    if UPCAST:
        q = q.to(tl.float32)
    for j in range(0, seqlen_k, BLOCK_N):
        keys = j + tl.arange(0, BLOCK_N)
        k = tl.load(K + keys[:, None] * D + columns[None, :])
        v = tl.load(V + keys[:, None] * D + columns[None, :])
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    tl.store(Out + rows[:, None] * D + columns[None, :], (acc / l[:, None]).to(Out.dtype.element_ty))


def attention(q, k, v, upcast=False, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2):
    o = torch.empty_like(q)
    seqlen, D = q.shape
    attention_kernel[lambda meta: (triton.cdiv(seqlen, meta["BLOCK_M"]),)](
        q, k, v, o, 0.1, k.shape[0], D=D, UPCAST=upcast, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return o


@torch.library.custom_op("flashsim_kernels::sample", mutates_args=())
def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v)


@operator.register_fake
def _(q, k, v):
    return torch.empty_like(q)


operator.register_autograd(lambda ctx, do: (None, None, None), setup_context=lambda ctx, inputs, output: None)


def by_operator(q, k, v):
    return operator(q, k, v)


@triton.jit
def descriptors_kernel(
    desc_q, K, V, desc_o, qk_scale, seqlen_k, D: tl.constexpr, SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Q and O by descriptors made on the host, K and V by those made on the device."""
    desc_k = tl.make_tensor_descriptor(K, shape=[seqlen_k, D], strides=[D, 1], block_shape=[BLOCK_N, D])
    desc_v = tl.make_tensor_descriptor(V, shape=[seqlen_k, D], strides=[D, 1], block_shape=[BLOCK_N, D])
    start = tl.program_id(0) * BLOCK_M
    q = desc_q.load([start, 0])
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for j in tl.range(0, seqlen_k, BLOCK_N, warp_specialize=SPECIALIZE):
        s = tl.dot(q, desc_k.load([j, 0]).T)
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(q.dtype), desc_v.load([j, 0]), acc * alpha[:, None])
        m = m_new
    desc_o.store([start, 0], (acc / l[:, None]).to(desc_o.dtype))


def by_descriptors(q, k, v, specialize=False, BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2):
    o = torch.empty_like(q)
    D = q.shape[1]
    descriptors = [TensorDescriptor.from_tensor(x, [BLOCK_M, D]) for x in (q, o)]
    descriptors_kernel[(triton.cdiv(q.shape[0], BLOCK_M),)](
        descriptors[0], k, v, descriptors[1], 0.1, k.shape[0], D=D, SPECIALIZE=specialize,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return o


@gluon.jit
def gluon_kernel(desc_a, desc_b, C, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """C = A B of one tile, by TMA and wgmma."""
    a = gl.allocate_shared_memory(gl.float16, desc_a.block_type.shape, desc_a.layout)
    b = gl.allocate_shared_memory(gl.float16, desc_b.block_type.shape, desc_b.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, desc_a.block_type.nbytes + desc_b.block_type.nbytes)
    tma_load(desc_a, [0, 0], full, a)
    tma_load(desc_b, [0, 0], full, b)
    mbarrier.wait(full, 0)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    c = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
    c = warpgroup_mma_wait(0, deps=[c])
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    gl.store(C + gl.expand_dims(rows, 1) * BLOCK_N + gl.expand_dims(columns, 0), c)


def by_gluon(a, b):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptors = [GluonDescriptor.from_tensor(x, list(x.shape), layout) for x in (a, b)]
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    gluon_kernel[(1,)](*descriptors, c, BLOCK_M=a.shape[0], BLOCK_N=b.shape[1], num_warps=4)
    return c


def two_kernels(q, k, v):
    attention(q, k, v)
    return by_descriptors(q, k, v)


def nothing(q, k, v):
    return q


def ends(q, k, v):
    raise SystemExit("enough")


def crashes(q, k, v):
    os.write(2, b"assertion failed in the compiler\n")
    os.abort()


def hangs(q, k, v):
    time.sleep(60)
