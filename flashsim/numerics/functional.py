"""The numbers of a functional run: the tensors that it reads and writes, and what they are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flashsim.errors import InputError
from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.compare import compare_exact, compare_rounded
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.layout import Float
from flashsim.numerics.reference import attention_reference
from flashsim.result import Functional

if TYPE_CHECKING:
    from flashsim.problem import AttentionProblem

MAX_FLOPS = 20e9
"""A functional run computes every tile in float64; more than this takes minutes and is refused."""


def refuse_large(problem: AttentionProblem) -> None:
    """Raises InputError for a problem that is too large for a functional run."""
    if problem.flops > MAX_FLOPS:
        raise InputError(
            f"a functional run of {problem.flops / 1e9:.0f} GFLOP would take minutes; "
            f"up to {MAX_FLOPS / 1e9:.0f} GFLOP are accepted"
        )


def run_tensors(problem: AttentionProblem, q: Float, k: Float, v: Float) -> dict[str, Any]:
    """q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), and everything that a schedule can write, full of NaN.

    O is (B, Sq, Hq, Dv), LSE (B, Sq, Hq), S and P (B, Sq, Hq, Sk).
    """
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    outputs = {"O": (*rows, problem.head_dim_v), "LSE": rows}
    outputs |= dict.fromkeys(("S", "P"), (*rows, problem.seqlen_k))
    return {"Q": q, "K": k, "V": v} | {name: np.full(shape, np.nan) for name, shape in outputs.items()}


def judge(problem: AttentionProblem, tensors: dict[str, Any], rounded: bool, stores_scores: bool = False) -> Functional:
    """What the run wrote into `tensors`, against float64 naive attention: to 1e-9, or by the rule for low precision.

    `stores_scores`: the schedule rounds S to the problem's dtype, as unfused attention does.
    """
    q, k, v = tensors["Q"], tensors["K"], tensors["V"]
    o, lse = attention_reference(q, k, v, problem.mask)
    mine, mine_lse = tensors["O"], tensors["LSE"].transpose(0, 2, 1)
    if rounded:
        eager = eager_attention(q, k, v, problem.dtype, problem.mask)
        s_dtype = problem.dtype if stores_scores else None
        bounds = rounding_bounds(q, k, v, problem.dtype, problem.mask, s_dtype=s_dtype)
        return compare_rounded(mine, mine_lse, o, lse, eager, bounds)
    return compare_exact(mine, mine_lse, o, lse, v)
