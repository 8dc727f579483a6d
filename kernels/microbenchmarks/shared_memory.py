"""Shared memory: bytes a cycle, and the latency of a load."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashsim_kernels.microbenchmarks.clocks import (
    barrier,
    read_clocks,
    start_together,
    thread_indices,
    write_readings,
)

UNROLL = 8
STEPS = 16


@gluon.jit
def shared_rate_kernel(readings, sink, n, UNROLL: gl.constexpr):
    threads = thread_indices()
    SIZE: gl.constexpr = 4 * 32 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    slots = gl.allocate_shared_memory(gl.int32, [2 * UNROLL, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = gl.arange(0, SIZE, layout)
    for k in gl.static_range(2 * UNROLL):
        slots.index(k).store(places + k)
    x = gl.zeros([SIZE], gl.int32, layout)
    start = start_together(threads)
    for i in range(n):
        for k in gl.static_range(UNROLL):
            # Another slot than the last time round, or the loads would be moved out of the loop.
            x ^= slots.index((i & 1) * UNROLL + k).load(layout)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    gl.store(sink + places, x)


def shared_rate(readings: torch.Tensor, sink: torch.Tensor, n: int) -> int:
    """n turns of LDS.128 by all warps, free of bank conflicts. Returns the bytes that a thread loads in a turn.

    `sink`: int32, four for each thread. At most eight warps, of which the CTA has 64 KiB of shared memory.
    """
    shared_rate_kernel[(readings.shape[0],)](readings, sink, n, UNROLL, num_warps=readings.shape[2] // 32)
    return 16 * UNROLL


# An address that holds itself, so that a chain of loads needs no arithmetic between them.
POINT_TO_ITSELF = """
mov.u32 $0, global_smem;
st.shared.u32 [$0], $0;
"""
CHASE = "ld.shared.u32 $0, [$1];\n" + "ld.shared.u32 $0, [$0];\n" * (STEPS - 1)


@gluon.jit
def shared_latency_kernel(readings, n, INIT: gl.constexpr, CHASE: gl.constexpr):
    threads = thread_indices()
    room = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    room.store(threads)
    barrier()
    x = gl.inline_asm_elementwise(INIT, "=r,r", [threads], gl.int32, is_pure=False, pack=1)
    start = start_together(threads)
    for _ in range(n):
        x = gl.inline_asm_elementwise(CHASE, "=r,r", [x], gl.int32, is_pure=False, pack=1)
    stop = read_clocks(threads)
    barrier()
    room.store(x)
    write_readings(readings, room.load(threads.type.layout), start, stop)


def shared_latency(readings: torch.Tensor, n: int) -> int:
    """n turns of LDS of 32 bits, each of the address that the one before it loaded. Returns how many there are in one.

    `readings`: of one warp.
    """
    shared_latency_kernel[(readings.shape[0],)](readings, n, POINT_TO_ITSELF, CHASE, num_warps=1)
    return STEPS
