"""kernels/fa3_triton.py: exact attention in each variant, whatever the problem, tile and strides; an operator."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from kernel_tests import case_of, examples, tiled_cases  # noqa: E402

from flashsim.testing import (  # noqa: E402
    KINDS,
    AttentionCase,
    Layout,
    assert_attention_close,
    assert_gradients_close,
    layouts,
    with_layout,
)
from flashsim_kernels import fa3_triton as module  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.fa2_backward import fa2_backward  # noqa: E402
from flashsim_kernels.fa3_triton import check_specialized, chosen_kernel, fa3_triton  # noqa: E402

Tiled = tuple[AttentionCase, dict[str, int]]
MASKS = ("full", "causal")
OVERLAP, SPECIALIZED, AWAITED = (
    {"warp_specialized": specialized, "intra_wg_overlap": overlap}
    for specialized, overlap in ((False, True), (True, False), (False, False))
)
VARIANTS = (OVERLAP, SPECIALIZED, AWAITED)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32}
FEW = case_of(batch=1, heads_q=2, heads_kv=1, seqlen_q=17, dtype="bf16")


def judge(case: AttentionCase, layout: Layout | None = None, **launch: Any) -> None:
    q, k, v = case.torch("cpu", layout)
    o, lse = fa3_triton(q, k, v, causal=case.causal, return_lse=True, **launch)
    assert o.dtype == q.dtype
    assert_attention_close(o, case, lse=lse)


@examples()
@given(tiled_cases(masks=MASKS), layouts(alignment=8), st.sampled_from(VARIANTS))
def test_exact(tiled: Tiled, layout: Layout, variant: dict[str, bool]) -> None:
    case, tile = tiled
    judge(case, layout, **tile, **variant)


@examples(dev=4, ci=15, nightly=60)
@given(tiled_cases(masks=MASKS, head_dims=(192, 256), max_flops=4e6), st.sampled_from(VARIANTS))
def test_wide_heads(tiled: Tiled, variant: dict[str, bool]) -> None:
    case, tile = tiled
    judge(case, **tile, **variant)


@pytest.mark.parametrize("variant", [{}, *VARIANTS])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 239), (239, 1), (128, 128), (33, 257), (150, 31)])
def test_with_the_tiles_of_the_launch_table(seqlens: tuple[int, int], mask: str, variant: dict[str, bool]) -> None:
    case = case_of(mask=mask, seqlen_q=seqlens[0], seqlen_k=seqlens[1], batch=1, heads_q=2, heads_kv=1)
    judge(case, **variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str, variant: dict[str, bool]) -> None:
    judge(case_of(kind, batch=1, heads_q=1, heads_kv=1), **SMALL, **variant)


@examples(dev=3, ci=10, nightly=40)
@given(tiled_cases(masks=MASKS, head_dims=(16, 32), max_flops=1e6), st.sampled_from(VARIANTS))
def test_gradients(tiled: Tiled, variant: dict[str, bool]) -> None:
    case, tile = tiled
    leaves = [x.requires_grad_() for x in case.torch()]
    o = fa3_triton(*leaves, causal=case.causal, deterministic=True, **tile, **variant)
    o.backward(case.torch_do())
    assert_gradients_close([x.grad for x in leaves], case)


def test_gradients_are_those_of_fa2_backward() -> None:
    case = case_of()
    leaves = [x.requires_grad_() for x in case.torch()]
    o, lse = fa3_triton(*leaves, causal=True, return_lse=True, deterministic=True, **SMALL)
    do = case.torch_do()
    (o * do).sum().backward()
    expected = fa2_backward(*case.torch(), o.detach(), lse.detach(), do, causal=True, deterministic=True)
    for x, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 2, 1e-3])
def test_scale(scale: float, variant: dict[str, bool]) -> None:
    case = case_of()
    o, lse = fa3_triton(*case.torch(), causal=True, scale=scale, return_lse=True, **SMALL, **variant)
    assert_attention_close(o, case, lse=lse, scale=scale)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_compute(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k = torch.ones(batch, seqlen_q, 4, 16, dtype=torch.float16), torch.ones(batch, seqlen_k, 2, 16).half()
    for causal in (False, True):
        o, lse = fa3_triton(q, k, k, causal=causal, return_lse=True)
        assert torch.equal(o, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((batch, 4, seqlen_q), float("-inf")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_keys(variant: dict[str, bool]) -> None:
    case = case_of(seqlen_q=50, seqlen_k=20)
    o, lse = fa3_triton(*case.torch(), causal=True, return_lse=True, **SMALL, **variant)
    assert not o[:, :30].any()
    assert torch.equal(lse[:, :, :30], torch.full((2, 4, 30), float("-inf")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_entry_or_a_head_is_computed_as_if_alone(variant: dict[str, bool]) -> None:
    q, k, v = case_of().torch()
    options = {"causal": True, "return_lse": True, **SMALL, **variant}
    o, lse = fa3_triton(q, k, v, **options)
    for b in range(2):
        alone = fa3_triton(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
        assert torch.equal(o[b : b + 1], alone[0])
        assert torch.equal(lse[b : b + 1], alone[1])
    for h in range(4):
        kv = slice(h // 2, h // 2 + 1)
        alone = fa3_triton(q[:, :, h : h + 1], k[:, :, kv], v[:, :, kv], **options)
        assert torch.equal(o[:, :, h : h + 1], alone[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_row_does_not_see_does_not_matter(variant: dict[str, bool]) -> None:
    q, k, v = case_of(seqlen_q=64, seqlen_k=64).torch()
    o = fa3_triton(q, k, v, causal=True, **SMALL, **variant)
    k[:, 48:], v[:, 48:] = 1e4, -1e4
    assert torch.equal(fa3_triton(q, k, v, causal=True, **SMALL, **variant)[:, :48], o[:, :48])


def test_one_row_of_any_stride() -> None:
    """A descriptor's stride must be a multiple of 16 bytes even where it leads nowhere."""
    case = case_of(seqlen_q=1, seqlen_k=1, mask="full")
    q, k, v = (torch.empty_strided(x.shape, (512, 3, 40, 1), dtype=x.dtype).copy_(x) for x in case.torch())
    assert_attention_close(fa3_triton(q, k, v), case)


def test_the_operator() -> None:
    tensors = [x.requires_grad_() for x in FEW.torch()]
    torch.library.opcheck(module.fa3_triton_op, (*tensors, None, 0, None, True, None, None, 16, 32, None, None))


@pytest.mark.parametrize("variant", [(False, True), (True, False), (False, False)])
def test_the_operator_without_gradients(variant: tuple[bool, bool]) -> None:
    torch.library.opcheck(module.fa3_triton_op, (*FEW.torch(), None, None, 0.5, False, *variant, 16, 32, 4, 2))


def test_compiled_into_a_model() -> None:
    case = case_of()

    def model(q: Any, k: Any, v: Any) -> Any:
        return fa3_triton(q + 0, k, v, causal=True, **SMALL) * 1

    o = torch.compile(model, backend="eager", fullgraph=True)(*case.torch())
    assert torch.equal(o, model(*case.torch()))


def test_lse_is_returned_only_where_it_is_asked_for() -> None:
    assert isinstance(fa3_triton(*case_of().torch()), torch.Tensor)


def test_an_allocator_that_somebody_has_set_stays() -> None:
    from triton.runtime import _allocation

    seen, before = [], _allocation._allocator.get()
    module.in_scratch_context(lambda: seen.append(_allocation._allocator.get()))
    assert seen[0] is not before
    assert _allocation._allocator.get() is before


# Arguments.


Q, K = torch.zeros(2, 5, 4, 32, dtype=torch.float16), torch.zeros(2, 7, 2, 32, dtype=torch.float16)
TMA = "TMA needs all rows at multiples of 16 bytes; use .contiguous()"


@pytest.mark.parametrize(
    ("tensors", "options", "line"),
    [
        ((Q, [1], K), {}, "k: must be a torch.Tensor, got list"),
        ((Q.float(), K, K), {}, "q: dtype torch.float32, allowed are torch.float16, torch.bfloat16"),
        ((Q, K[:, :3], K), {}, "k, v: (seqlen, heads) (3, 2) and (7, 2), must be the same"),
        (
            (with_layout(Q, Layout(row_padding=1)), K, K),
            {},
            f"q: strides (660, 132, 33, 1), first element 0 bytes beyond a multiple of 16: {TMA}",
        ),
        (
            (Q, K, with_layout(K, Layout(offset=1))),
            {},
            f"v: strides (448, 64, 32, 1), first element 2 bytes beyond a multiple of 16: {TMA}",
        ),
        ((Q, K, K), {"BLOCK_N": 24}, "BLOCK_N: got 24, allowed are the powers of two from 16 to 256"),
        ((Q, K, K), {"scale": -1.0}, "scale: got -1.0, must be a finite number from 0"),
        (
            (Q, K, K),
            {"warp_specialized": True, "intra_wg_overlap": True},
            "warp_specialized, intra_wg_overlap: both True, at most one may be: specialized by Triton, warps await "
            "their products; fa3 has both",
        ),
    ],
    ids=["no tensor", "fp32", "shapes", "row padding", "offset", "tile", "scale", "both variants"],
)
def test_bad_arguments(tensors: Any, options: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_scratch_context", lambda launch: pytest.fail("launched"))
    with pytest.raises(ArgumentError) as raised:
        fa3_triton(*tensors, **options)
    assert f"fa3_triton: {line}" in raised.value.problems


@pytest.mark.parametrize(
    ("arch", "BLOCK_M", "num_warps", "lines"),
    [
        ("hopper", 128, 4, ()),
        ("hopper", 64, 4, ("fa3_triton: BLOCK_M: got 64, warp_specialized needs 128 on hopper",)),
        ("hopper", 128, 8, ("fa3_triton: num_warps: got 8, warp_specialized needs 4 on hopper",)),
        (
            "hopper",
            256,
            16,
            (
                "fa3_triton: BLOCK_M: got 256, warp_specialized needs 128 on hopper",
                "fa3_triton: num_warps: got 16, warp_specialized needs 4 on hopper",
            ),
        ),
        ("blackwell", 64, 8, ()),
        ("blackwell", 32, 8, ("fa3_triton: BLOCK_M: got 32, warp_specialized needs 64 or 128 on blackwell",)),
    ],
)
def test_what_the_compiler_would_make_wrong_code_of(
    arch: str, BLOCK_M: int, num_warps: int, lines: tuple[str, ...]
) -> None:
    if not lines:
        check_specialized(arch, BLOCK_M, num_warps)
        return
    with pytest.raises(ArgumentError) as raised:
        check_specialized(arch, BLOCK_M, num_warps)
    assert raised.value.problems == lines


def test_it_is_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(module, "in_scratch_context", lambda launch: pytest.fail("launched"))
    with pytest.raises(ArgumentError, match="BLOCK_M: got 64, warp_specialized needs 128 on hopper"):
        fa3_triton(Q, K, K, warp_specialized=True, BLOCK_M=64)


@pytest.mark.parametrize(
    ("arch", "head_dim", "asked", "chosen"),
    [
        ("hopper", 128, (None, None), (False, True, "fa3_triton_fwd")),
        ("hopper", 256, (None, True), (False, True, "fa3_triton_fwd")),
        ("hopper", 128, (True, None), (True, False, "fa3_triton_fwd_specialized")),
        ("hopper", 128, (None, False), (False, False, "fa3_triton_fwd_awaited")),
        ("hopper", 128, (False, None), (False, True, "fa3_triton_fwd")),
        ("blackwell", 64, (None, None), (True, False, "fa3_triton_fwd")),
        ("blackwell", 128, (None, True), (False, True, "fa3_triton_fwd_overlap")),
        ("blackwell", 128, (False, None), (False, False, "fa3_triton_fwd_awaited")),
        ("blackwell", 256, (None, None), (False, True, "fa3_triton_fwd")),
        ("blackwell", 256, (True, False), (True, False, "fa3_triton_fwd_specialized")),
    ],
)
def test_which_variant_and_whose_tiles(
    arch: str, head_dim: int, asked: Any, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not said is as usual for the GPU, unless that would make it both."""
    monkeypatch.setattr(module, "architecture", lambda device: arch)
    q = torch.zeros(1, 1, 1, head_dim, dtype=torch.float16)
    assert chosen_kernel(q, q, *asked) == chosen


@pytest.mark.parametrize("arch", ["hopper", "blackwell"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("asked", [(None, None), (True, None), (None, True), (False, False)])
def test_tables_have_tiles_that_may_be_specialized(
    arch: str, head_dim: int, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "architecture", lambda device: arch)
    monkeypatch.setattr("flashsim_kernels.arguments.architecture", lambda device: arch)
    q = torch.zeros(1, 1, 1, head_dim, dtype=torch.float16)
    specialized, _, table = chosen_kernel(q, q, *asked)
    launch = module.launch_arguments("fa3_triton", table, q, q, {})
    if specialized:
        check_specialized(arch, launch["BLOCK_M"], launch["num_warps"])
