"""Launch parameters of the kernels in `flashsim_kernels`, for schedules that are asked to be one of them by `impl`.

Both read one table for each implementation, so that what is simulated is what is launched.
"""

from __future__ import annotations

from flashsim.errors import InputError
from flashsim.paired import use_kernels
from flashsim.problem import AttentionProblem

PUBLISHED = "published"
"""The `impl` of the published kernels, whose tiles the schedules themselves know."""


def launch_parameters(impl: str, kernel: str, problem: AttentionProblem, architecture: str) -> dict[str, int]:
    """Such as {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}, of `kernel` in the table of `impl`.

    Raises InputError where `flashsim_kernels` is not installed, or the kernel does not exist for this head dim, dtype
    and architecture.
    """
    use_kernels()
    from flashsim_kernels.launch import launch_parameters as from_table

    head_dim = max(problem.head_dim, problem.head_dim_v)
    try:
        row: dict[str, int] = from_table(impl, kernel, architecture, problem.dtype, head_dim)
    except LookupError as error:
        raise InputError(f"impl = {impl}: {error.args[0]}") from None
    return row


def power_of_two(width: int) -> int:
    """The head dim of the tiles: Triton and Gluon have powers of two only, of at least 16 for a product."""
    return max(16, 1 << (width - 1).bit_length())
