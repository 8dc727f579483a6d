"""Launch parameters: tiles, warps and stages of each kernel, read from the table of its implementation.

The tables are data (`triton.toml`, `gluon.toml`, beside this file). The kernels launch with them, and flashsim
simulates with them (`--set impl=triton`). A kernel has a list of rows; the first whose conditions hold is used:

    arch       "ampere", "ada", "hopper" or "blackwell"
    dtype      "fp16", "bf16", "fp32" or "fp8"
    head_dim   up to this; of head_dim and head_dim_v, the larger

A condition that a row does not have holds always. What is left of the row are the parameters.
"""

import tomllib
from functools import cache
from importlib.resources import files

CONDITIONS = ("arch", "dtype", "head_dim")


@cache
def table(implementation: str) -> dict[str, list[dict[str, int | str]]]:
    """Kernel name to rows, of "triton" or "gluon". Raises FileNotFoundError for any other implementation."""
    return tomllib.loads((files(__package__) / f"{implementation}.toml").read_text(encoding="utf-8"))


def launch_parameters(implementation: str, kernel: str, arch: str, dtype: str, head_dim: int) -> dict[str, int]:
    """Such as {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}.

    Raises LookupError where the table has no kernel of this name, or no row for these conditions.
    """
    rows = table(implementation).get(kernel)
    if rows is None:
        raise LookupError(
            f"{implementation}.toml has no kernel {kernel!r} (it has: {', '.join(table(implementation))})"
        )
    for row in rows:
        if (
            row.get("arch", arch) == arch
            and row.get("dtype", dtype) == dtype
            and head_dim <= int(row.get("head_dim", head_dim))
        ):
            return {name: int(value) for name, value in row.items() if name not in CONDITIONS}
    raise LookupError(f"{implementation}.toml: {kernel} has no row for {dtype}, head dim {head_dim}, on {arch}")
