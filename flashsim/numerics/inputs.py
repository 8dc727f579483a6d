"""Random tensors for functional runs and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsim.numerics.layout import Float
from flashsim.numerics.rounding import round_to

if TYPE_CHECKING:
    from flashsim.problem import AttentionProblem


def random_inputs(problem: AttentionProblem, seed: int, scale: float = 1.0) -> tuple[Float, Float, Float]:
    """q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv): normal, with standard deviation `scale`.

    The float64 values are those of the problem's dtype (bf16 before fp8), so a kernel reads them without error. The
    same problem and seed give the same tensors on every machine (NumPy's PCG64).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    shapes = (
        (problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim),
        (problem.batch, problem.seqlen_k, problem.heads_kv, problem.head_dim),
        (problem.batch, problem.seqlen_k, problem.heads_kv, problem.head_dim_v),
    )
    q, k, v = (round_to(scale * generator.standard_normal(shape), problem.output_dtype) for shape in shapes)
    return q, k, v


def random_do(problem: AttentionProblem, seed: int) -> Float:
    """dO (B, Sq, Hq, Dv), normal, for a backward pass; independent of `random_inputs` of the same seed."""
    import numpy as np

    shape = (problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim_v)
    return round_to(np.random.default_rng((seed, 1)).standard_normal(shape), problem.output_dtype)
