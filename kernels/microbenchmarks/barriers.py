"""Barriers: of a CTA, between two warpgroups, and in shared memory."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flashsim_kernels.microbenchmarks.clocks import (
    barrier,
    idle,
    read_clocks,
    start_together,
    thread_indices,
    write_readings,
)

UNROLL = 16
# The first 128 threads and the others hand over to each other, as two warpgroups that take turns do (hopper/
# named_barrier.hpp, WarpSchedulerWG1 and WarpSchedulerWG2): one arrives at the other's barrier and waits at its own.
PINGPONG = """{
.reg .pred first;
setp.lt.u32 first, $1, 128;
@first bar.arrive 2, 256;
@first bar.sync 1, 256;
@!first bar.sync 2, 256;
@!first bar.arrive 1, 256;
mov.u32 $0, $1;
}"""


@gluon.jit
def cta_barrier_kernel(readings, n, UNROLL: gl.constexpr):
    threads = thread_indices()
    start = start_together(threads)
    for _ in range(n):
        for _ in gl.static_range(UNROLL):
            barrier()
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)


def cta_barrier(readings: torch.Tensor, n: int) -> int:
    """n turns of BAR.SYNC of all warps. Returns how many there are in a turn."""
    cta_barrier_kernel[(readings.shape[0],)](readings, n, UNROLL, num_warps=readings.shape[2] // 32)
    return UNROLL


@gluon.jit
def named_barrier_kernel(readings, n, ASM: gl.constexpr, UNROLL: gl.constexpr):
    threads = thread_indices()
    x = threads
    start = start_together(threads)
    for _ in range(n):
        for _ in gl.static_range(UNROLL):
            x = gl.inline_asm_elementwise(ASM, "=r,r", [x], gl.int32, is_pure=False, pack=1)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)


def named_barrier(readings: torch.Tensor, n: int) -> int:
    """n turns of hand-overs between two warpgroups through two named barriers (BAR.ARV and BAR.SYNC of 256 threads).

    Returns the hand-overs in a turn; two are one BAR.SYNC of each warp. `readings`: of eight warps.
    """
    named_barrier_kernel[(readings.shape[0],)](readings, n, PINGPONG, UNROLL, num_warps=8)
    return 2 * UNROLL


@gluon.jit
def arrive_and_wait(readings, n, bar):
    threads = thread_indices()
    start = start_together(threads)
    for i in range(n):
        mbarrier.arrive(bar, count=1)
        mbarrier.wait(bar, i & 1)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)


@gluon.jit
def mbarrier_kernel(readings, n):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    gl.warp_specialize([(idle, ()), (arrive_and_wait, (readings, n, bar))], [1], [24])
    mbarrier.invalidate(bar)


def mbarrier_round(readings: torch.Tensor, n: int) -> None:
    """n turns of one warp that arrives at an mbarrier and waits for that phase (SYNCS.ARRIVE, SYNCS.PHASECHK).

    Needs sm_90. `readings`: of one warp.
    """
    mbarrier_kernel[(readings.shape[0],)](readings, n, num_warps=4)
