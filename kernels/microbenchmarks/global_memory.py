"""L2 and HBM: rates of plain loads and of TMA, latencies, and what it takes to issue a TMA load."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashsim_kernels.microbenchmarks.clocks import (
    idle,
    read_clocks,
    start_together,
    thread_indices,
    write_readings,
)

UNROLL = 8
CHASE = 8
# tma.async_copy_global_to_shared until Triton 3.7.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def stream_kernel(readings, x, sink, n, tiles, UNROLL: gl.constexpr):
    threads = thread_indices()
    CHUNK: gl.constexpr = 4 * 32 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    places = gl.arange(0, CHUNK, layout)
    total = gl.zeros([CHUNK], gl.int32, layout)
    start = start_together(threads)
    for i in range(n):
        # All CTAs side by side, and back to the start; `tiles` is a power of two.
        first = ((i * gl.num_programs(0) + gl.program_id(0)) & (tiles - 1)) * (UNROLL * CHUNK)
        for k in gl.static_range(UNROLL):
            total ^= gl.load(x + first + k * CHUNK + places, cache_modifier=".cg")
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    gl.store(sink + places, total)


def stream(readings: torch.Tensor, x: torch.Tensor, sink: torch.Tensor, n: int) -> int:
    """n turns of LDG.128 past the L1, by every CTA of `readings`, over all of `x` and from its start again.

    Returns the bytes that a CTA loads in a turn. `x`: int32, a power of two and at most 2 ** 30 of them; what stays in
    L2 is read from there. `sink`: int32, four for each thread of a CTA.
    """
    num_warps = readings.shape[2] // 32
    tile = UNROLL * 4 * 32 * num_warps
    stream_kernel[(readings.shape[0],)](readings, x, sink, n, x.numel() // tile, UNROLL, num_warps=num_warps)
    return 4 * tile


@gluon.jit
def chase_kernel(readings, place, n, STEPS: gl.constexpr):
    threads = thread_indices()
    address = gl.load(place)
    start = start_together(threads)
    for _ in range(n):
        for _ in gl.static_range(STEPS):
            address = gl.load(address.to(gl.pointer_type(gl.int64)), cache_modifier=".cg")
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    gl.store(place, address)


def chase(readings: torch.Tensor, place: torch.Tensor, n: int) -> int:
    """n turns of loads of 64 bits past the L1, each of the address that the one before it loaded.

    Returns how many there are in a turn. `place`: int64, one address, where to begin; the one to go on from is written
    there. `readings`: of one warp.
    """
    chase_kernel[(readings.shape[0],)](readings, place, n, CHASE, num_warps=1)
    return CHASE


@gluon.jit
def load_boxes(readings, desc, n, first, mask, slot, bar, LOADS: gl.constexpr):
    threads = thread_indices()
    ROWS: gl.constexpr = desc.block_type.shape[0]
    start = start_together(threads)
    for i in range(n):
        mbarrier.expect(bar, LOADS * desc.block_type.nbytes)
        for k in gl.static_range(LOADS):
            # Into the same memory: nobody reads it.
            tma_load(desc, [(first + (i * LOADS + k) * ROWS) & mask, 0], bar, slot)
        mbarrier.wait(bar, i & 1)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)


@gluon.jit
def tma_kernel(readings, desc, n, first, mask, LOADS: gl.constexpr):
    slot = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    gl.warp_specialize([(idle, ()), (load_boxes, (readings, desc, n, first, mask, slot, bar, LOADS))], [1], [24])
    mbarrier.invalidate(bar)


def tma_loads(readings: torch.Tensor, x: torch.Tensor, n: int, *, first: int, rows: int, loads: int) -> int:
    """n turns of `loads` TMA loads of boxes of `rows` x 128 bytes, one mbarrier for all of them, and the wait for it.

    Box after box of `x`, from the row `first` on and round again. Returns the bytes in a turn. `x`: fp16 (rows, 64),
    a power of two of rows, `rows` at most 256; `readings`: of one warp. Needs sm_90.
    """
    layout = gl.NVMMASharedLayout.get_default_for([rows, 64], gl.float16)
    desc = TensorDescriptor.from_tensor(x, [rows, 64], layout)
    tma_kernel[(readings.shape[0],)](readings, desc, n, first, x.shape[0] - 1, loads, num_warps=4)
    return loads * rows * 128
