"""The clocks that a kernel can read, and where its readings go."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# gl.thread_barrier until Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def thread_indices():
    return gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def read_clocks(threads):
    """(SM cycles, ns) of each thread. The SM's counter is common to its warps; the one of ns to all SMs, and coarse:
    it moves every 32 ns or 1 us.

    Volatile, so that the compiler moves no other volatile instruction, store or loop across.
    """
    clk = gl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l,r", [threads], gl.int64, is_pure=False, pack=1)
    ns = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [threads], gl.int64, is_pure=False, pack=1)
    return clk, ns


@gluon.jit
def start_together(threads):
    """As read_clocks, once all warps of the CTA are there."""
    barrier()
    return read_clocks(threads)


@gluon.jit
def write_readings(readings, threads, start, stop):
    """`readings` is (CTAs, 4, threads): cycles at start and stop, ns at start and stop."""
    row = readings + gl.program_id(0) * 4 * 32 * gl.num_warps() + threads
    for k in gl.static_range(2):
        gl.store(row + 2 * k * 32 * gl.num_warps(), start[k])
        gl.store(row + (2 * k + 1) * 32 * gl.num_warps(), stop[k])


@gluon.jit
def idle():
    """Of the other warps, where one warp is measured in a partition of its own, as a producer is.

    Elsewhere the compiler puts a barrier of the CTA before a TMA load, and around an arrival at an mbarrier.
    """


def new_readings(ctas: int, num_warps: int, device: str) -> torch.Tensor:
    """For the readings of one launch."""
    return torch.zeros((ctas, 4, 32 * num_warps), dtype=torch.int64, device=device)
