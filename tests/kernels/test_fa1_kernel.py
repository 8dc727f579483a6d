"""FlashAttention-1's kernel: exact for any tile, layout and length, with gradients, and as an operator."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, case_of, examples, tiled_cases  # noqa: E402

from flashsim.testing import AttentionCase, Layout, assert_attention_close, assert_gradients_close, layouts  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.fa1 import fa1, fa1_op  # noqa: E402

Tiled = tuple[AttentionCase, dict[str, int]]
MASKS = ("full", "causal")
HEAD_DIMS = (16, 24, 64, 128, 256)


@examples()
@given(tiled_cases(masks=MASKS, head_dims=HEAD_DIMS), layouts())
def test_exact(tiled: Tiled, layout: Layout) -> None:
    case, tile = tiled
    o, lse = fa1(*case.torch("cpu", layout), causal=case.causal, return_lse=True, **tile)
    assert_attention_close(o, case, lse=lse)


@examples(6, 30, 150)
@given(tiled_cases(masks=MASKS, head_dims=(16, 40)))
def test_exact_in_fp32(tiled: Tiled) -> None:
    case, tile = tiled
    q, k, v = (x.float() * FULL_PRECISION for x in case.torch())
    o, lse = fa1(q, k, v, causal=case.causal, return_lse=True, **tile)
    assert_attention_close(o, q, k, v, lse=lse, dtype="fp32", mask=case.mask)


@examples(4, 12, 60)
@given(tiled_cases(masks=MASKS, head_dims=(16, 40), max_flops=1e6))
def test_gradients(tiled: Tiled) -> None:
    case, tile = tiled
    leaves = [x.requires_grad_() for x in case.torch()]
    fa1(*leaves, causal=case.causal, **tile).backward(case.torch_do())
    assert_gradients_close([x.grad for x in leaves], case)


def test_launch_table() -> None:
    case = case_of(seqlen_q=150, seqlen_k=200, head_dim=128)
    o, lse = fa1(*case.torch(), causal=True, return_lse=True)
    assert_attention_close(o, case, lse=lse)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_compute(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = (torch.randn(batch, n, 2, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    o, lse = fa1(q, k, v, return_lse=True)
    assert o.shape == (batch, seqlen_q, 2, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())


def test_a_custom_operator() -> None:
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for n, heads in ((20, 2), (33, 1), (33, 1)))
    torch.library.opcheck(fa1_op, (q, k, v, None, 0, None, False, 16, 16, None, None))


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (20, 33, 33))
    compiled = torch.compile(lambda *x: fa1(*x, causal=True, return_lse=True), backend="eager", fullgraph=True)
    for mine, expected in zip(compiled(q, k, v), fa1(q, k, v, causal=True, return_lse=True), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"BLOCK_M": 24}, "fa1: BLOCK_M: got 24"),
        ({"scale": float("nan")}, "fa1: scale"),
        ({"num_warps": 3}, "fa1: num_warps"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 4, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        fa1(x, x, x, **options)
