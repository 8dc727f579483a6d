"""Launches: kernels that do nothing, and kernels that say when they ran."""

import torch
from triton.experimental import gluon

from flashsim_kernels.microbenchmarks.clocks import read_clocks, thread_indices, write_readings


@gluon.jit
def empty_kernel():
    pass


def empty(ctas: int, num_warps: int = 4) -> None:
    """A kernel that ends at once."""
    empty_kernel[(ctas,)](num_warps=num_warps)


@gluon.jit
def stamp_kernel(readings):
    threads = thread_indices()
    start = read_clocks(threads)
    write_readings(readings, threads, start, read_clocks(threads))


def stamp(readings: torch.Tensor) -> None:
    """A kernel that reads the clocks twice and ends."""
    stamp_kernel[(readings.shape[0],)](readings, num_warps=readings.shape[2] // 32)
