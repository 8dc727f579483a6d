"""Matrix products: mma.sync of one warp on each sub-partition, wgmma of one warpgroup."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashsim_kernels.microbenchmarks.clocks import read_clocks, start_together, thread_indices, write_readings

UNROLL = 8


@gluon.jit
def load_matrix(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    return gl.load(x + gl.expand_dims(rows, 1) * COLUMNS + gl.expand_dims(columns, 0))


@gluon.jit
def store_matrix(x, value, LAYOUT: gl.constexpr):
    rows = gl.arange(0, value.shape[0], gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))
    gl.store(x + gl.expand_dims(rows, 1) * value.shape[1] + gl.expand_dims(columns, 0), value)


@gluon.jit
def mma_sync_kernel(readings, operands, sink, n, CHAINS: gl.constexpr, UNROLL: gl.constexpr):
    threads = thread_indices()
    M: gl.constexpr = 16 * gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    a = load_matrix(operands, M, 16, gl.DotOperandLayout(0, layout, k_width=2))
    b = load_matrix(operands, 16, 8 * CHAINS, gl.DotOperandLayout(1, layout, k_width=2))
    acc = gl.zeros([M, 8 * CHAINS], gl.float32, layout)
    start = start_together(threads)
    for _ in range(n):
        for _ in gl.static_range(UNROLL):
            acc = mma_v2(a, b, acc)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    store_matrix(sink, acc, layout)


def mma_sync(readings: torch.Tensor, operands: torch.Tensor, sink: torch.Tensor, n: int, *, chains: int) -> int:
    """n turns of HMMA.16816.F32 by each warp, on `chains` accumulators in turn (a power of two; 1 gives the latency).

    Returns how often a turn updates each accumulator: a warp has `chains` times as many HMMA in the loop. `operands`:
    fp16, `sink`: fp32, both (64, 64). Two or four warps are on one sub-partition if there are eight or sixteen.
    """
    num_warps = readings.shape[2] // 32
    mma_sync_kernel[(readings.shape[0],)](readings, operands, sink, n, chains, UNROLL, num_warps=num_warps)
    return UNROLL


@gluon.jit
def wgmma_kernel(
    readings, operands, sink, n,
    N: gl.constexpr, K: gl.constexpr, A_IN_SHARED: gl.constexpr,
):  # fmt: skip
    threads = thread_indices()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    # What the memory holds makes no difference, so nothing is written to it.
    b = gl.allocate_shared_memory(gl.float16, [N, K], gl.NVMMASharedLayout.get_default_for([N, K], gl.float16))
    acc = gl.zeros([64, N], gl.float32, layout)
    if A_IN_SHARED:
        a = gl.allocate_shared_memory(gl.float16, [64, K], gl.NVMMASharedLayout.get_default_for([64, K], gl.float16))
    else:
        a = load_matrix(operands, 64, K, gl.DotOperandLayout(0, layout, k_width=2))
    start = start_together(threads)
    for _ in range(n):
        acc = warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)
        if A_IN_SHARED:
            acc = warpgroup_mma_wait(0, deps=[acc])
        else:
            acc, a = warpgroup_mma_wait(0, deps=[acc, a])  # without a here, its registers are copied every turn
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    store_matrix(sink, acc, layout)


def wgmma(
    readings: torch.Tensor,
    operands: torch.Tensor,
    sink: torch.Tensor,
    n: int,
    *,
    columns: int,
    group: int,
    a_in_shared: bool,
) -> None:
    """n turns of a group of HGMMA.64x`columns`x16.F32, committed together and awaited.

    The time of a turn is a constant, of filling and draining the tensor core, and `group` issue intervals. `group`: 4,
    8 or 16; `operands`: fp16 (64, 256); `sink`: fp32 (64, 256); readings of four warps. Needs sm_90a.
    """
    wgmma_kernel[(readings.shape[0],)](
        readings, operands, sink, n, columns, 16 * group, a_in_shared, num_warps=readings.shape[2] // 32
    )
