"""kernels/fa2_backward.py: exact gradients in both of its ways, by itself and through autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, case_of, examples, mask_arguments, tiled_cases  # noqa: E402

from flashsim.testing import LAYOUTS, AttentionCase, Layout, assert_gradients_close, layouts  # noqa: E402
from flashsim_kernels import fa2_backward as module  # noqa: E402
from flashsim_kernels.fa2 import fa2  # noqa: E402
from flashsim_kernels.fa2_backward import fa2_backward  # noqa: E402

Tiled = tuple[AttentionCase, dict[str, int]]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32}
SQUARE = {"BLOCK_M": 16, "BLOCK_N": 16}
EDGES = (0, 1, 14, 15, 16, 17)
"""Of a window: tiles begin and end with it, and one key beside."""
BOTH = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])


def gradients(case: AttentionCase, layout: Layout | None = None, **options: Any) -> Any:
    q, k, v = case.torch("cpu", layout)
    mask, do = mask_arguments(case.mask), case.torch_do("cpu", layout)
    o, lse = fa2(q, k, v, return_lse=True, **mask)
    return fa2_backward(q, k, v, o, lse, do, **mask, **options)


@examples()
@given(tiled_cases(max_flops=5e5), layouts(), st.booleans())
def test_exact(tiled: Tiled, layout: Layout, deterministic: bool) -> None:
    case, tile = tiled
    found = gradients(case, layout, deterministic=deterministic, **tile)
    assert [x.shape for x in found] == [x.shape for x in case.torch()]
    assert {x.dtype for x in found} == {case.torch()[0].dtype}
    assert_gradients_close(found, case)


@examples(dev=3, ci=10, nightly=40)
@given(tiled_cases(head_dims=(192, 256), max_flops=2e6), st.booleans())
def test_wide_heads(tiled: Tiled, deterministic: bool) -> None:
    case, tile = tiled
    assert_gradients_close(gradients(case, deterministic=deterministic, **tile), case)


@examples(dev=6, ci=20, nightly=100)
@given(tiled_cases(max_flops=5e5), st.booleans())
def test_exact_in_fp32(tiled: Tiled, deterministic: bool) -> None:
    case, tile = tiled
    q, k, v, do = (x.float() * FULL_PRECISION for x in (*case.torch(), case.torch_do()))
    mask = mask_arguments(case.mask)
    o, lse = fa2(q, k, v, return_lse=True, **mask)
    found = fa2_backward(q, k, v, o, lse, do, **mask, deterministic=deterministic, **tile)
    assert_gradients_close(found, q, k, v, do, dtype="fp32", mask=case.mask)


@BOTH
@pytest.mark.parametrize("mask", ["full", "causal", "window:9,4"])
@pytest.mark.parametrize("seqlens", [(1, 239), (64, 64), (97, 31)])
def test_with_the_tiles_of_the_launch_table(mask: str, seqlens: tuple[int, int], deterministic: bool) -> None:
    case = case_of(mask=mask, seqlen_q=seqlens[0], seqlen_k=seqlens[1])
    assert_gradients_close(gradients(case, deterministic=deterministic), case)


@pytest.mark.parametrize("left", EDGES)
def test_every_edge_of_a_window(left: int) -> None:
    for n, right in enumerate(EDGES):
        case = case_of(batch=1, heads_q=1, heads_kv=1, seqlen_q=33, seqlen_k=47, mask=f"window:{left},{right}")
        assert_gradients_close(gradients(case, deterministic=n % 2 == 0, **SQUARE), case)


@BOTH
@pytest.mark.parametrize("head_dim", [24, 40])
def test_padding_beside_head_dims_that_are_no_powers_of_two(head_dim: int, deterministic: bool) -> None:
    case = case_of(seqlen_q=32, seqlen_k=64, head_dim=head_dim, mask="full")
    found = gradients(case, LAYOUTS["padded rows"], deterministic=deterministic, **SQUARE)
    assert_gradients_close(found, case)


@BOTH
def test_through_autograd(deterministic: bool) -> None:
    case = case_of(dtype="bf16")
    leaves = [x.requires_grad_() for x in case.torch()]
    o = fa2(*leaves, causal=True, deterministic=deterministic, **SMALL)
    o.backward(case.torch_do())
    assert_gradients_close([x.grad for x in leaves], case)
    q, k, v = case.torch()
    o, lse = fa2(q, k, v, causal=True, return_lse=True, **SMALL)
    by_hand = fa2_backward(q, k, v, o, lse, case.torch_do(), causal=True, deterministic=deterministic)
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, by_hand, strict=True))


@pytest.mark.parametrize("uses_o", [False, True], ids=["LSE alone", "O and LSE"])
def test_gradients_of_the_lse(uses_o: bool) -> None:
    """d LSE = P d S: by finite differences of attention in float64 along a direction of each input."""
    case = case_of(seqlen_q=20, seqlen_k=15)  # rows that see no key, too
    leaves = [(x.float() * FULL_PRECISION).requires_grad_() for x in case.torch()]
    o, lse = fa2(*leaves, causal=True, return_lse=True, **SMALL)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(lse.shape, generator=generator)
    do = torch.randn(o.shape, generator=generator) if uses_o else torch.zeros(o.shape)
    seen = lse.isfinite()
    ((lse * weight)[seen].sum() + ((o * do).sum() if uses_o else 0)).backward()

    q, k, v = (x.detach().double().requires_grad_() for x in leaves)
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, repeated[0]) * 32**-0.5
    scores = scores.masked_fill(~torch.ones(20, 15, dtype=torch.bool).tril(15 - 20), float("-inf"))[:, :, 5:]
    total = (scores.logsumexp(3) * weight[:, :, 5:]).sum()
    total = total + (torch.einsum("bhqk,bkhd->bqhd", scores.softmax(3), repeated[1]) * do[:, 5:]).sum()
    for leaf, expected in zip(leaves, torch.autograd.grad(total, (q, k, v)), strict=True):
        assert torch.allclose(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_the_lse_that_is_zero_changes_no_bit() -> None:
    case = case_of()
    q, k, v = case.torch()
    o, lse = fa2(q, k, v, causal=True, return_lse=True)
    without = fa2_backward(q, k, v, o, lse, case.torch_do(), causal=True)
    with_zeros = fa2_backward(q, k, v, o, lse, case.torch_do(), dlse=torch.zeros_like(lse), causal=True)
    assert all(torch.equal(x, y) for x, y in zip(without, with_zeros, strict=True))


@BOTH
@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_compute(sizes: tuple[int, int, int], deterministic: bool) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q = torch.ones(batch, seqlen_q, 4, 16, dtype=torch.float16)
    k = torch.ones(batch, seqlen_k, 2, 16, dtype=torch.float16)
    o, lse = fa2(q, k, k, return_lse=True)
    found = fa2_backward(q, k, k, o, lse, torch.ones_like(q), deterministic=deterministic)
    assert all(torch.equal(x, torch.zeros_like(y)) for x, y in zip(found, (q, k, k), strict=True))


@BOTH
def test_rows_without_keys_have_no_gradient(deterministic: bool) -> None:
    case = case_of(seqlen_q=50, seqlen_k=20)
    dq, dk, dv = gradients(case, deterministic=deterministic, **SMALL)
    assert not dq[:, :30].any()
    assert_gradients_close((dq, dk, dv), case)


def test_expanded_and_transposed_gradients_of_o() -> None:
    """What autograd hands over: stride 0 after a sum, any order after a transposition."""
    case = case_of()
    for spread in (
        torch.ones(1, 1, 1, 1, dtype=torch.float16).expand(2, 40, 4, 32),
        case.torch_do().transpose(1, 3).contiguous().transpose(1, 3),
    ):
        leaves = [x.requires_grad_() for x in case.torch()]
        fa2(*leaves, causal=True, **SMALL).backward(spread)
        assert_gradients_close([x.grad for x in leaves], *case.qkv, np.asarray(spread), dtype="fp16", mask="causal")


def test_deterministic_gradients_are_the_same_bits_and_batch_entries_are_alone() -> None:
    case = case_of()
    q, k, v = case.torch()
    do = case.torch_do()
    o, lse = fa2(q, k, v, causal=True, return_lse=True)
    options = {"causal": True, "deterministic": True, **SMALL}
    first = fa2_backward(q, k, v, o, lse, do, **options)
    again = fa2_backward(q, k, v, o, lse, do, **options)
    alone = fa2_backward(*(x[1:] for x in (q, k, v, o, lse, do)), **options)
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[1:], z)


def test_torch_can_ask_for_deterministic_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    launch = module.launch_fa2_backward
    monkeypatch.setattr(
        module, "launch_fa2_backward", lambda *args, **kw: asked.append(args[10]) or launch(*args, **kw)
    )
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    gradients(case_of(), **SMALL)
    assert asked == [True]


@BOTH
def test_the_operator(deterministic: bool) -> None:
    case = case_of(seqlen_q=9, seqlen_k=12)
    q, k, v = case.torch()
    o, lse = fa2(q, k, v, causal=True, return_lse=True)
    arguments = (q, k, v, o, lse, case.torch_do(), None, None, 0, None, deterministic, 16, 16)
    torch.library.opcheck(module.fa2_backward_op, arguments)


def test_compiled_into_a_model() -> None:
    case = case_of()

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (fa2(q, k, v, causal=True, **SMALL).float() ** 2).sum()

    def found(function: Any) -> list[Any]:
        leaves = [x.requires_grad_() for x in case.torch()]
        function(*leaves).backward()
        return [x.grad for x in leaves]

    compiled = found(torch.compile(loss, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled, found(loss), strict=True))
