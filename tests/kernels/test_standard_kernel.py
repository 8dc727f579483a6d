"""The kernels of standard attention: as exact as unfused attention, overflow included, with gradients.

Unfused attention is what `flashsim.testing` holds other kernels against; the LSE of a kernel that stores S in 16 bits
is as exact as that, which the bounds allow for with `s_dtype`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, case_of, examples, tiled_cases  # noqa: E402

from flashsim.numerics.bounds import rounding_bounds  # noqa: E402
from flashsim.numerics.compare import Comparison, compare_gradients, forward_clauses  # noqa: E402
from flashsim.numerics.eager import eager_attention  # noqa: E402
from flashsim.numerics.gradient_bounds import gradient_bounds  # noqa: E402
from flashsim.numerics.gradients import (  # noqa: E402
    Gradients,
    attention_gradients_reference,
    eager_gradients,
)
from flashsim.numerics.reference import attention_reference  # noqa: E402
from flashsim.testing import KINDS, AttentionCase, Layout, layouts  # noqa: E402
from flashsim.testing.arrays import to_float64  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.standard import standard, standard_op  # noqa: E402

Run = tuple[AttentionCase, dict[str, int]]
MASKS = ("full", "causal")
HEAD_DIMS = (16, 24, 64, 128, 256)
SCORES = (64, 1024, 4096)
"""That a program of the softmax has at a time: less than a row, or some rows."""
MOST_ROWS = 64
"""For which the softmax may have a program each: one takes a millisecond here."""
LARGEST = 65504
KINDS_TO_STORE = tuple(kind for kind in KINDS if kind != "huge_scores")
"""Of scores beyond 20000, rounding to 16 bits leaves no softmax that could be compared."""


@st.composite
def runs(draw: st.DrawFn, **options: Any) -> Run:
    """A case and tiles."""
    case, tile = draw(tiled_cases(masks=MASKS, **options))
    p = case.problem
    scores = draw(st.sampled_from(SCORES))
    if p.batch * p.heads_q * p.seqlen_q > MOST_ROWS:
        scores = SCORES[-1]
    return case, tile | {"BLOCK_K": draw(st.sampled_from((16, 64))), "SCORES": scores}


def assert_rounded(o: Any, lse: Any, q: Any, k: Any, v: Any, dtype: str, mask: str) -> None:
    """As `assert_attention_close`, with bounds that know of the rounding of S."""
    o, lse, q, k, v = (to_float64(x) for x in (o, lse, q, k, v))
    eager, bounds = eager_attention(q, k, v, dtype, mask), rounding_bounds(q, k, v, dtype, mask, s_dtype=dtype)
    check(Comparison(forward_clauses(o, lse, *attention_reference(q, k, v, mask), eager, bounds)))


def assert_rounded_gradients(gradients: list[Any], case: AttentionCase) -> None:
    """As `assert_gradients_close`, likewise."""
    given = (*case.qkv, case.do)
    reference = attention_gradients_reference(*given, case.mask)
    bounds = gradient_bounds(*given, case.dtype, case.mask, s_dtype=case.dtype)
    mine, eager = Gradients(*map(to_float64, gradients)), eager_gradients(*given, case.dtype, case.mask)
    check(compare_gradients(mine, reference, eager, bounds))


def check(comparison: Comparison) -> None:
    assert comparison.accepted, "\n".join(f"{c.what}: {c.value:.3g}, allowed {c.limit:.3g}" for c in comparison.broken)


def overflows(case: AttentionCase) -> NDArray[np.bool_]:
    """(batch, heads, seqlen_q): rows that unfused attention makes NaN, its scores being beyond the case's dtype."""
    return np.isnan(eager_attention(case.q, case.k, case.v, case.dtype, case.mask)).any(axis=3).swapaxes(1, 2)


@examples()
@given(runs(head_dims=HEAD_DIMS, kinds=KINDS_TO_STORE), layouts())
def test_exact(run: Run, layout: Layout) -> None:
    case, tiles = run
    assume(not overflows(case).any())  # beyond 65504, fp16 ends, and unfused attention with it
    o, lse = standard(*case.torch("cpu", layout), causal=case.causal, return_lse=True, **tiles)
    assert_rounded(o, lse, *case.qkv, case.dtype, case.mask)


@examples(6, 30, 100)
@given(runs(head_dims=(16,), dtypes=("fp16",), kinds=("huge_scores",)))
def test_overflow_is_nan_as_in_unfused_attention(run: Run) -> None:
    case, tiles = run
    s = np.einsum("bihd,bjhd->bhij", case.q, np.repeat(case.k, case.problem.heads_per_kv, axis=2)) / 4
    assume(not np.any((np.abs(s) > LARGEST - 64) & (np.abs(s) < LARGEST + 64)))  # which round this way or that
    o = standard(*case.torch(), causal=case.causal, **tiles)
    assert np.array_equal(o.isnan().any(dim=3).transpose(1, 2).numpy(), overflows(case))


def test_a_row_of_nothing_but_overflow_is_no_row_without_keys() -> None:
    q, k = torch.full((1, 5, 1, 16), -200, dtype=torch.float16), torch.full((1, 3, 1, 16), 200, dtype=torch.float16)
    o = standard(q, k, k, causal=True)
    assert bool((o[:, :2] == 0).all())
    assert bool(o[:, 2:].isnan().all())


@examples(6, 30, 150)
@given(runs(head_dims=(16, 40)))
def test_exact_in_fp32(run: Run) -> None:
    case, tiles = run
    q, k, v = (x.float() * FULL_PRECISION for x in case.torch())
    o, lse = standard(q, k, v, causal=case.causal, return_lse=True, **tiles)
    assert_rounded(o, lse, q, k, v, "fp32", case.mask)


@examples(4, 12, 60)
@given(runs(head_dims=(16, 40), kinds=("normal", "ones", "rising", "dominant_key"), max_flops=1e6))
def test_gradients(run: Run) -> None:
    case, tiles = run
    leaves = [x.requires_grad_() for x in case.torch()]
    standard(*leaves, causal=case.causal, **tiles).backward(case.torch_do())
    assert_rounded_gradients([x.grad for x in leaves], case)


def test_launch_table() -> None:
    case = case_of(seqlen_q=150, seqlen_k=200, head_dim=128)
    o, lse = standard(*case.torch(), causal=True, return_lse=True)
    assert_rounded(o, lse, *case.qkv, case.dtype, case.mask)


@pytest.mark.parametrize("seqlen_k", [33, 100])
def test_rows_longer_than_a_block(seqlen_k: int) -> None:
    """The maximum rises from block to block, and the last block is not full."""
    q, v = torch.ones(1, 3, 1, 16), torch.randn(1, seqlen_k, 1, 16)
    k = torch.linspace(-20, 20, seqlen_k)[None, :, None, None].expand(1, seqlen_k, 1, 16).contiguous()
    o, lse = standard(q, k, v, return_lse=True, SCORES=16)
    expected, expected_lse = attention_reference(q, k, v)
    np.testing.assert_allclose(o.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_compute(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = (torch.randn(batch, n, 2, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    o, lse = standard(q, k, v, return_lse=True)
    assert o.shape == (batch, seqlen_q, 2, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())


def test_a_custom_operator() -> None:
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for n, heads in ((20, 2), (33, 1), (33, 1)))
    torch.library.opcheck(standard_op, (q, k, v, None, 0, None, False, 16, 16, 16, 256, None, None))


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (20, 33, 33))
    compiled = torch.compile(lambda *x: standard(*x, causal=True, return_lse=True), backend="eager", fullgraph=True)
    for mine, expected in zip(compiled(q, k, v), standard(q, k, v, causal=True, return_lse=True), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"BLOCK_K": 8}, "standard: BLOCK_K: got 8"),
        ({"SCORES": 100}, "standard: SCORES: got 100"),
        ({"scale": float("inf")}, "standard: scale"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 4, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        standard(x, x, x, **options)
