"""The numbers of a functional run: the tensors that it reads and writes, and what they are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsim.errors import InputError
from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.compare import (
    compare_exact,
    compare_fp8,
    compare_gradients,
    compare_gradients_exact,
    compare_rounded,
    gradient_errors,
)
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.fp8 import emulated_attention, fp8_bounds, quantize
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.hadamard import hadamard_transform
from flashsim.numerics.layout import Float
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.verbs import HADAMARD_SEED
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


def run_tensors(problem: AttentionProblem, q: Float, k: Float, v: Float, do: Float | None = None) -> dict[str, Any]:
    """The tensors that a call is given, and those that it writes, full of NaN.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) and, for a backward pass, do (B, Sq, Hq, Dv); O is like dO,
    LSE (B, Sq, Hq), dQ, dK and dV like q, k and v.
    """
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    given = {"Q": q, "K": k, "V": v}
    wanted = {"O": (*rows, problem.head_dim_v), "LSE": rows}
    if "bwd" in problem.passes:
        assert do is not None
        given["dO"] = do
        wanted |= {"dQ": q.shape, "dK": k.shape, "dV": v.shape}
    return given | {name: np.full(shape, np.nan) for name, shape in wanted.items()}


def quantize_inputs(tensors: dict[str, Any], BLOCK_M: int, BLOCK_N: int, incoherent: str) -> None:
    """Replace Q, K and V by e4m3 codes and their scales, one for each block of rows.

    incoherent: Q and K are multiplied by a Hadamard matrix before that (`fused`), or the kernels do both (`separate`),
    and find them as they are in Q_16 and K_16.
    """
    for name, block in (("Q", BLOCK_M), ("K", BLOCK_N), ("V", BLOCK_N)):
        values = tensors[name]
        if incoherent == "separate" and name != "V":
            tensors[f"{name}_16"] = values
            tensors[f"{name}_scale"] = np.full((*values.shape[:3], 1), np.nan)
            continue
        if incoherent == "fused" and name != "V":
            values = hadamard_transform(values, HADAMARD_SEED)
        found = quantize(values, block)
        tensors[name] = found.codes
        tensors[f"{name}_scale"] = np.repeat(found.scales, block, axis=1)[:, : values.shape[1], :, None]


def _dequantized(tensors: dict[str, Any], name: str) -> Float:
    """What the codes of Q, K or V stand for; a kernel writes the scale of a block into its first row."""
    scale = tensors[f"{name}_scale"]
    last = np.maximum.accumulate(np.where(np.isnan(scale), 0, np.arange(scale.shape[1])[:, None, None]), axis=1)
    values: Float = tensors.get(f"{name}_fp8", tensors[name]) * np.take_along_axis(scale, last, axis=1)
    return values


def judge(problem: AttentionProblem, tensors: dict[str, Any], rounded: bool, stores_scores: bool = False) -> Functional:
    """What the run wrote into `tensors`, against float64 naive attention: to 1e-9, or by the rule for low precision.

    `stores_scores`: the schedule rounds S to the problem's dtype, as unfused attention does.
    """
    mask, dropout = problem.mask, problem.dropout
    if problem.dtype == "fp8":
        return _judge_fp8(problem, tensors, rounded)
    q, k, v = tensors["Q"], tensors["K"], tensors["V"]
    o, lse = attention_reference(q, k, v, mask, dropout=dropout)
    mine, mine_lse = tensors["O"], tensors["LSE"].transpose(0, 2, 1)
    s_dtype = problem.dtype if stores_scores else None
    if rounded:
        eager = eager_attention(q, k, v, problem.dtype, mask, dropout=dropout)
        bounds = rounding_bounds(q, k, v, problem.dtype, mask, s_dtype=s_dtype, dropout=dropout)
        found = compare_rounded(mine, mine_lse, o, lse, eager, bounds)
    else:
        found = compare_exact(mine, mine_lse, o, lse, v)
    if "bwd" not in problem.passes:
        return found
    errors, accepted = _judge_gradients(problem, tensors, rounded, s_dtype)
    return replace(found, gradient_max_abs_error=errors, accepted=found.accepted and accepted)


def _judge_fp8(problem: AttentionProblem, tensors: dict[str, Any], rounded: bool) -> Functional:
    """As `judge`, against attention of what the quantized tensors stand for."""
    q, k, v = (_dequantized(tensors, name) for name in ("Q", "K", "V"))
    o, lse = attention_reference(q, k, v, problem.mask)
    mine, mine_lse = tensors["O"], tensors["LSE"].transpose(0, 2, 1)
    found = compare_exact(mine, mine_lse, o, lse, v)
    quantized = _quantized_as_asked(tensors, rounded)
    if not rounded:
        return replace(found, accepted=found.accepted and quantized)
    twin = emulated_attention(q, k, v, problem.output_dtype, problem.mask)
    bounds = fp8_bounds(q, k, v, problem.output_dtype, problem.mask)
    return replace(found, accepted=compare_fp8(mine, mine_lse, o, lse, twin, bounds).accepted and quantized)


def _quantized_as_asked(tensors: dict[str, Any], rounded: bool) -> bool:
    """Where kernels have quantized Q and K: do their codes stand for the transformed tensors, but for rounding?"""
    for name in ("Q", "K"):
        if f"{name}_16" in tensors:
            wanted = hadamard_transform(tensors[f"{name}_16"], HADAMARD_SEED)
            # Half a unit in the last of e4m3's four digits; below its normal numbers, half of 2^-9 of the scale.
            scale = np.nanmax(tensors[f"{name}_scale"])
            allowed = np.abs(wanted) / 16 + scale * 2.0**-10 if rounded else 1e-9 * np.abs(wanted).max(initial=0.0)
            if np.any(np.abs(_dequantized(tensors, name) - wanted) > allowed):
                return False
    return True


def _judge_gradients(
    problem: AttentionProblem, tensors: dict[str, Any], rounded: bool, s_dtype: str | None
) -> tuple[dict[str, float], bool]:
    """(largest error of dq, dk and dv, whether they are accepted)."""
    given = Gradients(tensors["dQ"], tensors["dK"], tensors["dV"])
    q, k, v, do = (tensors[name] for name in ("Q", "K", "V", "dO"))
    dtype, mask, dropout = problem.dtype, problem.mask, problem.dropout
    reference = attention_gradients_reference(q, k, v, do, mask, dropout=dropout)
    errors = gradient_errors(given, reference)
    if not rounded:
        return errors, compare_gradients_exact(given, reference, q, k, v, do)
    eager = eager_gradients(q, k, v, do, dtype, mask, dropout=dropout)
    bounds = gradient_bounds(q, k, v, do, dtype, mask, s_dtype=s_dtype, dropout=dropout)
    return errors, compare_gradients(given, reference, eager, bounds).accepted
