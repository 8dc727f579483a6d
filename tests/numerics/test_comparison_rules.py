"""The acceptance rules, against a fused kernel in low precision that is correct, and against one bug at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.compare import Clause, Comparison, compare_exact, compare_rounded, forward_clauses
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to
from flashsim.result import Functional

Array = NDArray[np.float64]
f32 = np.float32


class Case(NamedTuple):
    q: Array
    k: Array
    v: Array
    dtype: str
    mask: str

    def reference(self) -> tuple[Array, Array]:
        return attention_reference(self.q, self.k, self.v, self.mask)

    def judge(self, o: Array, lse: Array) -> Functional:
        eager = eager_attention(self.q, self.k, self.v, self.dtype, self.mask)
        bounds = rounding_bounds(self.q, self.k, self.v, self.dtype, self.mask)
        return compare_rounded(o, lse, *self.reference(), eager, bounds)


def fused(case: Case, BLOCK_N: int = 16, bug: str = "") -> tuple[Array, Array]:
    """Online softmax over KV tiles, last to first, as FlashAttention-2 has it: P and O in `dtype`, the rest in fp32."""
    q, k, v = (x.astype(f32) for x in case[:3])
    (batch, seqlen_q, heads, head_dim), seqlen_k, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    o, lse = np.zeros((batch, seqlen_q, heads, v.shape[3])), np.zeros((batch, heads, seqlen_q))
    scale = f32(1 if bug == "unscaled" else 2 * head_dim**-0.5 if bug == "scaled twice" else head_dim**-0.5)
    shift = seqlen_k - seqlen_q + (bug == "causal off by one")
    for b, h in np.ndindex(batch, heads):
        kv = h % k.shape[2] if bug == "GQA interleaved" else h // group
        m, total = np.full((seqlen_q, 1), -np.inf, f32), np.zeros((seqlen_q, 1), f32)
        acc: NDArray[np.floating] = np.zeros((seqlen_q, v.shape[3]), f32)
        for start in reversed(range(0, seqlen_k, BLOCK_N)):
            stop = min(start + BLOCK_N, seqlen_k)
            vj = v[b, start:stop, kv]
            s = q[b, :, h] @ k[b, start:stop, kv].T * scale
            if bug == "tail not masked" and stop == seqlen_k:
                s, vj = np.pad(s, ((0, 0), (0, 1))), np.pad(vj, ((0, 1), (0, 0)))
            elif case.mask == "causal":
                s = np.where(np.arange(start, stop) <= np.arange(seqlen_q)[:, None] + shift, s, f32(-np.inf))
            peak = s.max(axis=1, keepdims=True)
            m_new = peak if bug == "own maximum, no rescaling" else np.maximum(m, peak)
            safe = np.where(m_new == -np.inf, f32(0), m_new)
            p, alpha = np.exp(s - safe), np.exp(m - safe)
            if bug == "own maximum, no rescaling" or (bug == "O not rescaled" and start == 0):
                alpha_o = np.ones_like(alpha)
            else:
                alpha_o = alpha
            if bug == "a key lost" and start == 0:
                p[:, 0] = 0
            total = p.sum(axis=1, keepdims=True) + (total if bug.startswith("own") else total * alpha)
            p = round_to(p, "e4m3" if bug == "P in fp8" else case.dtype).astype(f32)
            if bug == "a value tile twice" and start == 0 and seqlen_k > BLOCK_N:
                vj = v[b, BLOCK_N : BLOCK_N + len(vj), kv]
                p = p[:, : len(vj)]
            acc, m = acc * alpha_o + p @ vj, m_new
        if bug == "l in low precision":
            total = round_to(total, case.dtype).astype(f32)
        seen = total > 0
        divisor = np.where(seen & (bug != "not divided by l"), total, 1)
        o[b, :, h] = round_to(np.where(seen, acc / divisor, 0), case.dtype)
        log = np.log2 if bug == "LSE in base 2" else np.log
        offset = 0 if bug == "LSE without the maximum" else m
        lse[b, h] = np.where(seen, offset + log(np.where(seen, total, 1)), -np.inf)[:, 0]
    return o, lse


def normal_case(dtype: str = "fp16", mask: str = "causal", seed: int = 0) -> Case:
    """Four query heads on two KV heads, the last KV tile is short, no row without keys."""
    rng = np.random.default_rng(seed)
    shapes = ((1, 40, 4, 32), (1, 60, 2, 32), (1, 60, 2, 40))
    q, k, v = (round_to(rng.standard_normal(shape), dtype) for shape in shapes)
    return Case(q, k, v, dtype, mask)


DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])
BUGS = [
    "own maximum, no rescaling", "O not rescaled", "unscaled", "scaled twice", "causal off by one", "GQA interleaved",
    "tail not masked", "a key lost", "a value tile twice", "not divided by l", "LSE in base 2",
    "LSE without the maximum", "P in fp8", "l in low precision",
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("seed", range(3))
def test_known_bugs_are_rejected(bug: str, dtype: str, seed: int) -> None:
    case = normal_case(dtype, "full" if bug == "tail not masked" else "causal", seed)
    assert case.judge(*fused(case)).accepted
    assert not case.judge(*fused(case, bug=bug)).accepted


VALUES = ("normal", "integers", "constant", "equal keys", "v = k", "tiny", "large", "two kinds of key")


def structured(rng: np.random.Generator, values: str, shapes: list[tuple[int, ...]], dtype: str) -> list[Array]:
    """Inputs on which eager attention tends to be exact by luck, or rounding errors to agree with each other."""
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    if values == "integers":
        q, k, v = (rng.integers(-1, 2, shape).astype(float) for shape in shapes)
    elif values == "constant":
        q, k, v = (np.full(shape, rng.standard_normal()) for shape in shapes)
    elif values == "equal keys":
        k[:] = k[:, :1]
    elif values == "v = k":
        v = k[..., : v.shape[3]]
    elif values == "tiny":
        q, k, v = q * 0.02, k * 0.02, v * 1e-4
    elif values == "large":
        q, k, v = q * 5, k * 3, v * 1e4
    elif values == "two kinds of key":
        k[:], v[:] = k[:, :1], 1
        k[:, ::2], v[:, ::2] = rng.standard_normal(k.shape[-1]), -1
    return [round_to(x, dtype) for x in (q, k, v)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    lengths = st.sampled_from([1, 2, 3, 5, 16, 17, 33, 64, 100])
    heads_kv, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    seqlen_q, seqlen_k, head_dim = draw(lengths), draw(lengths), draw(st.sampled_from([1, 2, 8, 64]))
    shapes: list[tuple[int, ...]] = [
        (1, seqlen_q, heads_kv * group, head_dim),
        *[(1, seqlen_k, heads_kv, head_dim)] * 2,
    ]
    dtype, mask = draw(st.sampled_from(["fp16", "bf16"])), draw(st.sampled_from(["full", "causal"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    q, k, v = structured(rng, draw(st.sampled_from(VALUES)), shapes, dtype)
    return Case(q, k, v, dtype, mask), draw(st.sampled_from([1, 4, 16, 64]))


@given(cases())
def test_a_correct_kernel_is_accepted(drawn: tuple[Case, int]) -> None:
    """And stays within the bounds element by element, which is what they claim."""
    case, BLOCK_N = drawn
    o, lse = fused(case, BLOCK_N)
    result = case.judge(o, lse)
    assert result.accepted, result
    bounds = rounding_bounds(*case, BLOCK_N=BLOCK_N)
    assert (np.abs(o - case.reference()[0]) <= bounds.o).all()


@given(cases())
def test_eager_and_exact_results_are_accepted(drawn: tuple[Case, int]) -> None:
    case, _ = drawn
    o, lse = case.reference()
    assert case.judge(o, lse).accepted
    assert case.judge(eager_attention(*case), lse).accepted
    result = compare_exact(o, lse, *case.reference(), case.v)
    assert result == Functional(0.0, 0.0, 0.0, accepted=True)


@DTYPES
def test_bounds_are_small(dtype: str) -> None:
    """A few roundings of the dtype, the mean's far below the largest: they forgive luck, not bugs."""
    rng = np.random.default_rng(0)
    q, k, v = (round_to(rng.standard_normal((1, 256, 2, 64)), dtype) for _ in range(3))
    bounds = rounding_bounds(q, k, v, dtype)
    u = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    assert bounds.o.max() < 3 * u
    assert bounds.o_mean < 0.4 * u
    assert bounds.lse.max() < 5e-5


def spoiled(o: Array, lse: Array) -> dict[str, tuple[Array, Array]]:
    """One thing wrong at a time."""

    def put(x: Array, value: float) -> Array:
        x = x.copy()
        x[(0, *(n // 2 for n in x.shape[1:]))] = value
        return x

    return {
        "NaN in O": (put(o, np.nan), lse),
        "infinite O": (put(o, np.inf), lse),
        "zeros": (np.zeros_like(o), lse),
        "a row of zeros": (o * (np.arange(o.shape[1]) != 3)[:, None, None], lse),
        "a zero": (put(o, 0.0), lse),
        "one wrong element": (put(o, 0.5), lse),
        "heads and rows exchanged": (o.transpose(0, 2, 1, 3).reshape(o.shape), lse),
        "twice": (2 * o, lse),
        "wrong shape": (o[:, :-1], lse),
        "broadcast": (o[:, :1], lse),
        "NaN in LSE": (o, put(lse, np.nan)),
        "LSE off by 1e-3": (o, lse + 1e-3),
        "one LSE wrong": (o, put(lse, 0.0)),
        "LSE -inf": (o, put(lse, -np.inf)),
        "LSE zero": (o, np.zeros_like(lse)),
        "LSE as (batch, seqlen, heads)": (o, lse.transpose(0, 2, 1)),
    }


@pytest.mark.parametrize("wrong", sorted(spoiled(np.zeros((1, 9, 2, 2)), np.zeros((1, 2, 9)))))
def test_spoiled_results_are_rejected(wrong: str) -> None:
    case = normal_case()
    exact = case.reference()
    o, lse = spoiled(*exact)[wrong]
    assert not compare_exact(o, lse, *exact).accepted
    assert not compare_exact(o, lse, *exact, case.v).accepted
    o, lse = spoiled(*fused(case))[wrong]
    assert not case.judge(o, lse).accepted


def test_errors_without_a_value_are_infinite() -> None:
    o, lse = normal_case().reference()
    result = compare_exact(np.where(o == o.max(), np.nan, o), lse[..., 1:], o, lse)
    assert result == Functional(np.inf, np.inf, np.inf, accepted=False)


def test_a_reference_with_nan_accepts_nothing() -> None:
    case = normal_case()
    o, lse = case.reference()
    bad = np.where(o == o.max(), np.nan, o)
    bounds = rounding_bounds(*case)
    for mine in (o, bad):
        assert not compare_exact(mine, lse, bad, lse).accepted
        assert not compare_rounded(mine, lse, bad, lse, o, bounds).accepted
    assert not compare_exact(o, lse, o, np.where(lse == lse.max(), np.nan, lse)).accepted
    case.v[0, 3] = np.nan
    assert not case.judge(o, lse).accepted
    assert not compare_exact(o, lse, o, lse, case.v).accepted


def test_exact_tolerance() -> None:
    o, lse = normal_case().reference()
    assert compare_exact(o + 0.9e-9, lse + 0.9e-9, o, lse).accepted
    assert not compare_exact(o + 1.1e-9 * max(1, abs(o).max()), lse, o, lse).accepted
    assert not compare_exact(o, lse + 1.1e-9 * abs(lse).max(), o, lse).accepted
    assert compare_exact(o * 1e6 + 1e-4, lse, o * 1e6, lse).accepted


def test_zeros_are_told_from_small_values() -> None:
    case = normal_case()
    v = case.v * 1e-12
    o, lse = attention_reference(case.q, case.k, v, case.mask)
    assert compare_exact(o, lse, o, lse, v).accepted
    assert not compare_exact(np.zeros_like(o), lse, o, lse, v).accepted


def test_a_zero_is_rejected_where_other_errors_hide_it() -> None:
    """Row 0 sees one small value; elsewhere values, and so the errors that are allowed, are a million times larger."""
    case = normal_case("bf16", "causal")
    q, k, v = case.q, case.k[:, :40], case.v[:, :40] * 2.0**10
    v[:, 0] = 2.0**-10
    case = Case(q, k, v, "bf16", "causal")
    o, lse = fused(case)
    assert case.judge(o, lse).accepted
    result = case.judge(np.where(np.arange(40)[:, None, None] == 0, 0, o), lse)
    assert not result.accepted
    assert result.max_abs_error == case.judge(o, lse).max_abs_error


def test_lse_of_scores_that_cancel() -> None:
    """Terms of several hundred that nearly cancel leave an fp32 LSE off by more than 1e-5, in any kernel."""
    rng = np.random.default_rng(3)
    q, k, v = (round_to(30 * rng.standard_normal((1, n, 1, 64)), "fp16") for n in (2000, 1, 1))
    case = Case(q, k, v, "fp16", "full")
    o, lse = fused(case)
    lse_ref = case.reference()[1]
    assert (np.abs(lse - lse_ref) > 1e-5 * np.maximum(1, np.abs(lse_ref))).any()
    assert case.judge(o, lse).accepted
    assert not case.judge(o, lse + 0.02).accepted


def test_bounds_cover_probabilities_that_underflow() -> None:
    """A thousand keys of probability 2e-9 and value 60000 are lost in fp16, and the bound says so."""
    k = np.zeros((1, 1001, 1, 1))
    k[0, -1] = 20  # visited first, so that its score is the maximum throughout
    v = np.where(k == 20, 1.0, 60000.0)
    case = Case(np.ones((1, 1, 1, 1)), k, v, "fp16", "full")
    o, _ = fused(case)
    error = abs(o - case.reference()[0]).item()
    assert 0.1 < error <= rounding_bounds(*case).o.item()


def test_fully_masked_rows() -> None:
    """Rows without keys must be 0 and -inf; +inf, as FlashAttention-2 returns, is another convention."""
    rng = np.random.default_rng(1)
    q, k, v = (round_to(rng.standard_normal((1, n, 1, 8)), "fp16") for n in (7, 4, 4))
    case = Case(q, k, v, "fp16", "causal")
    o, lse = fused(case)
    assert case.judge(o, lse).accepted
    assert (lse[0, 0, :3] == -np.inf).all()
    assert not case.judge(o, np.where(np.isinf(lse), np.inf, lse)).accepted
    assert not case.judge(o, np.where(np.isinf(lse), -1e30, lse)).accepted
    assert not case.judge(np.where(np.arange(7)[:, None, None] == 0, v[:, :1], o), lse).accepted


def test_eager_overflow_is_no_ruler() -> None:
    """Scores beyond 65504 make eager fp16 NaN; a fused kernel keeps them in fp32 and is right."""
    rng = np.random.default_rng(2)
    q, k, v = (round_to(rng.standard_normal((1, 20, 1, 8)), "fp16") for _ in range(3))
    case = Case(q * 512, k * 512, v, "fp16", "full")
    assert np.isnan(eager_attention(*case)).any()
    o, lse = fused(case)
    assert case.judge(o, lse).accepted
    assert not case.judge(-o, lse).accepted


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_empty_tensors(sizes: tuple[int, int, int]) -> None:
    seqlen_q, seqlen_k, head_dim_v = sizes
    case = Case(
        np.ones((1, seqlen_q, 1, 4)),
        np.ones((1, seqlen_k, 1, 4)),
        np.ones((1, seqlen_k, 1, head_dim_v)),
        "bf16",
        "full",
    )
    o, lse = case.reference()
    assert case.judge(o, lse) == compare_exact(o, lse, o, lse, case.v) == Functional(0.0, 0.0, 0.0, accepted=True)


def test_bounds_refuse_unknown_dtypes() -> None:
    one = np.ones((1, 1, 1, 1))
    with pytest.raises(InputError, match="unknown dtype 'fp61', did you mean 'fp16'") as caught:
        rounding_bounds(one, one, one, "fp61", p_dtype="e4m4")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["dtype", "p_dtype"]


def test_a_comparison_says_what_is_broken() -> None:
    case = normal_case()
    exact, eager, bounds = case.reference(), eager_attention(*case), rounding_bounds(*case)
    result = Comparison(forward_clauses(exact[0], exact[1] + 1e-3, *exact, eager, bounds))
    assert not result.accepted
    (broken,) = result.broken
    assert broken.what == "LSE: error / tolerance"
    assert broken.value > broken.limit == 1
    assert result.clauses[0] == Clause("O: largest error", 0.0, result.clauses[0].limit)
