"""The block-sparse kernels: exact for any mask of blocks, alone and with the causal mask, forward and backward."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, case_of, examples  # noqa: E402

from flashsim.testing import (  # noqa: E402
    AttentionCase,
    Layout,
    assert_attention_close,
    assert_gradients_close,
    attention_cases,
    layouts,
)
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.block_mask import block_lists, visible_blocks  # noqa: E402
from flashsim_kernels.block_sparse import block_sparse, block_sparse_op  # noqa: E402
from flashsim_kernels.block_sparse_backward import block_sparse_backward_op  # noqa: E402

Run = tuple[AttentionCase, Any, dict[str, Any]]
BLOCKS = ((16, 16, 16), (32, 16, 16), (32, 32, 16), (32, 16, 32), (64, 32, 32))
"""(mask_block, BLOCK_M, BLOCK_N)."""
HEAD_DIMS = (16, 24, 64, 128, 256)
DENSITIES = (0.0, 0.2, 0.5, 0.8, 1.0)
LENGTHS = st.integers(1, 90) | st.sampled_from([16 * n + beside for n in range(1, 5) for beside in (-1, 0, 1)])


@st.composite
def runs(draw: st.DrawFn, shared: bool = False, max_flops: float = 2e6, **options: Any) -> Run:
    """A case, a mask of its blocks (one for all, with `shared`; else also for each head, batch entry, or both), and the
    keyword arguments of the kernel."""
    mask_block, BLOCK_M, BLOCK_N = draw(st.sampled_from(BLOCKS))
    tile = mask_block, mask_block
    case = draw(attention_cases(tile=tile, max_tiles=(3, 4), max_flops=max_flops, **options))
    p = case.problem
    batch, heads = (draw(st.sampled_from((1,) if shared else (1, n))) for n in (p.batch, p.heads_q))
    shape = batch, heads, -(-p.seqlen_q // mask_block), -(-p.seqlen_k // mask_block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from(DENSITIES))
    return case, mask, {"mask_block": mask_block, "causal": case.causal, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}


def element_mask(mask: Any, mask_block: int, case: AttentionCase) -> Any:
    """(batch, heads, seqlen_q, seqlen_k): whether a query sees a key."""
    p = case.problem
    whole = mask.repeat_interleave(mask_block, 2)[:, :, : p.seqlen_q].repeat_interleave(mask_block, 3)[
        ..., : p.seqlen_k
    ]
    if case.causal:
        whole = whole & torch.ones(p.seqlen_q, p.seqlen_k, dtype=torch.bool).tril(p.seqlen_k - p.seqlen_q)
    return whole.expand(p.batch, p.heads_q, -1, -1)


@contextmanager
def as_text(seen: Any) -> Iterator[str]:
    """`seen` (seqlen_q, seqlen_k) in flashsim's spelling of masks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.txt"
        rows = (" ".join(map(str, np.flatnonzero(row))) for row in seen.numpy())
        path.write_text("\n".join(["1 1", *rows]) + "\n", encoding="utf-8")
        yield f"blocks:{path}"


def heads_of(case: AttentionCase, *qkv: Any) -> Iterator[tuple[int, int, list[Any]]]:
    """Batch entry, query head, and q, k, v of that head alone."""
    p = case.problem
    for b, h in np.ndindex(p.batch, p.heads_q):
        kv = h // p.heads_per_kv
        yield b, h, [x[b : b + 1, :, n : n + 1] for x, n in zip(qkv, (h, kv, kv), strict=True)]


def judge(o: Any, lse: Any, run: Run, dtype: str, *qkv: Any) -> None:
    case, mask, options = run
    seen = element_mask(mask, options["mask_block"], case)
    for b, h, of_head in heads_of(case, *qkv):
        with as_text(seen[b, h]) as text:
            mine, mine_lse = o[b : b + 1, :, h : h + 1], lse[b : b + 1, h : h + 1]
            assert_attention_close(mine, *of_head, lse=mine_lse, dtype=dtype, mask=text)


@examples()
@given(runs(head_dims=HEAD_DIMS), layouts())
def test_exact(run: Run, layout: Layout) -> None:
    case, mask, options = run
    o, lse = block_sparse(*case.torch("cpu", layout), mask, return_lse=True, **options)
    judge(o, lse, run, case.dtype, *case.qkv)


@examples(6, 30, 150)
@given(runs(head_dims=(16, 40)))
def test_exact_in_fp32(run: Run) -> None:
    case, mask, options = run
    q, k, v = (x.float() * FULL_PRECISION for x in case.torch())
    o, lse = block_sparse(q, k, v, mask, return_lse=True, **options)
    judge(o, lse, run, "fp32", q, k, v)


@examples(4, 30, 150)
@given(runs(shared=True, head_dims=(16, 40, 128), max_flops=1e6), layouts())
def test_gradients(run: Run, layout: Layout) -> None:
    case, mask, options = run
    leaves = [x.requires_grad_() for x in case.torch("cpu", layout)]
    block_sparse(*leaves, mask, **options).backward(case.torch_do(layout=layout))
    with as_text(element_mask(mask, options["mask_block"], case)[0, 0]) as text:
        gradients = [x.grad for x in leaves]
        assert_gradients_close(gradients, *case.qkv, case.do, dtype=case.dtype, mask=text)


def judge_gradients_in_fp32(run: Run) -> None:
    """Of O and of the LSE, against float64; the mask may be another one for each head and batch entry."""
    case, mask, options = run
    p = case.problem
    seen = element_mask(mask, options["mask_block"], case)
    leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in case.qkv]
    q, k, v = (x.repeat_interleave(p.heads_q // x.shape[2], dim=2).transpose(1, 2) for x in leaves)
    s = (q @ k.transpose(2, 3) * p.head_dim**-0.5).masked_fill(~seen, -1e30)
    # exp(-1e30 - max) is 0, and in a row without keys, where it is 1, everything is multiplied by 0.
    some = seen.any(dim=3)
    expected_o = ((s.softmax(3) * some[..., None]) @ v).transpose(1, 2)
    expected_lse = torch.where(some, s.logsumexp(3), 0.0)
    do, dlse = torch.from_numpy(case.do.copy()), torch.randn(some.shape, dtype=torch.float64)
    expected = torch.autograd.grad((expected_o * do).sum() + (expected_lse * dlse).sum(), leaves)

    mine = [x.detach().float().requires_grad_() for x in leaves]
    o, lse = block_sparse(*mine, mask, return_lse=True, **options)
    torch.autograd.backward([o, lse], [do.float(), dlse.float()])
    for x, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(x.grad, wanted.float(), rtol=1e-4, atol=1e-4 * float(1 + wanted.abs().max()))


@examples(4, 20, 100)
@given(runs(head_dims=(16, 24), kinds=("normal", "dominant_key"), max_flops=1e6))
def test_gradients_of_masks_that_differ(run: Run) -> None:
    judge_gradients_in_fp32(run)


@pytest.mark.parametrize("kind", ["normal", "negative_rows"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "mask"), [(47, 47, "causal"), (33, 50, "causal"), (40, 39, "full")])
def test_gradients_of_two_heads_that_share_keys(seqlen_q: int, seqlen_k: int, mask: str, kind: str) -> None:
    """Every block on the diagonal is there; rows with scores near -150 have an LSE whose exponential is 0 in fp32."""
    case = case_of(kind, batch=1, heads_q=2, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16, mask=mask)
    blocks = torch.ones(1, 2, -(-seqlen_q // 16), -(-seqlen_k // 16), dtype=torch.bool)
    blocks[0, 0, 0, 1:], blocks[0, 1, 1:, 0] = False, False
    judge_gradients_in_fp32((case, blocks, {"mask_block": 16, "causal": case.causal}))


def test_the_same_gradients_in_every_run() -> None:
    q, k, v, do = (torch.randn(1, 70, 2, 16, dtype=torch.float16) for _ in range(4))
    mask = torch.rand(1, 2, 5, 5) < 0.6

    def gradients() -> Any:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(block_sparse(*leaves, mask, 16), leaves, do)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@examples(50, 100, 300)
@given(st.integers(1, 3), st.integers(1, 3), LENGTHS, LENGTHS, st.booleans(), st.integers(0, 999))
def test_lists_have_what_remains_of_a_mask(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, causal: bool, seed: int
) -> None:
    mask_block = 16
    rows, columns = -(-seqlen_q // mask_block), -(-seqlen_k // mask_block)
    mask = torch.rand(batch, heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    elements = torch.ones(rows * mask_block, columns * mask_block, dtype=torch.bool)
    elements = elements.tril(seqlen_k - seqlen_q) if causal else elements
    elements[:, seqlen_k:] = False
    elements = elements[:seqlen_q]
    some, every = (
        torch.stack([torch.stack([of(c) for c in r.split(mask_block, 1)]) for r in elements.split(mask_block)])
        for of in (torch.any, torch.all)
    )
    seen, whole = visible_blocks(mask, mask_block, seqlen_q, seqlen_k, causal)
    assert torch.equal(seen, mask & some)
    assert torch.equal(whole, mask & every)
    lie = seen.mT.contiguous().mT  # as the columns of a mask do
    blocks, counts, stride_b, stride_h = block_lists(lie)
    assert blocks.is_contiguous()
    assert counts.is_contiguous()
    assert (stride_b, stride_h) == (heads * rows * (batch > 1), rows * (heads > 1))
    for b, h, row in np.ndindex(batch, heads, rows):
        listed = blocks[b, h, row, : counts[b, h, row]].tolist()
        assert listed == seen[b, h, row].nonzero().flatten().tolist()
        first = whole[b, h, row].sum()
        assert listed[:first] == whole[b, h, row].nonzero().flatten().tolist()


def test_work_goes_with_what_remains() -> None:
    """Keys that no block of the mask has are never read: NaN in them has no effect, and it would in a masked tile."""
    q, k, v = (torch.randn(1, 64, 1, 16) for _ in range(3))
    k[:, 16:32] = v[:, 16:32] = float("nan")
    mask = torch.tensor([True, False, True, True]).expand(1, 1, 4, 4)
    assert bool(block_sparse(q, k, v, mask, 16).isfinite().all())


def test_launch_table() -> None:
    q, k, v = (torch.randn(1, n, 2, 128, dtype=torch.float16) for n in (150, 300, 300))
    mask = torch.tensor([[True, False, True], [True, True, False]])[None, None]
    o, lse = block_sparse(q, k, v, mask, return_lse=True)
    seen = mask[0, 0].repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :300]
    with as_text(seen) as text:
        assert_attention_close(o, q, k, v, lse=lse, mask=text)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_compute(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = (torch.randn(batch, n, 2, 16, requires_grad=True) for n in (seqlen_q, seqlen_k, seqlen_k))
    mask = torch.ones(1, 1, int(seqlen_q > 0), int(seqlen_k > 0), dtype=torch.bool)
    o, lse = block_sparse(q, k, v, mask, return_lse=True)
    assert o.shape == (batch, seqlen_q, 2, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())
    o.sum().backward()
    assert all(bool((x.grad == 0).all()) for x in (q, k, v))


def test_custom_operators() -> None:
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for n, heads in ((20, 2), (33, 1), (33, 1)))
    mask = torch.tensor([[True, False, True], [False, True, True]])[None, None]
    torch.library.opcheck(block_sparse_op, (q, k, v, mask, 16, True, None, None, None, None, None))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = block_sparse(q, k, v, mask, 16, return_lse=True)
    arguments = q, k, v, mask, o, lse, torch.randn_like(o), None, 16, False, None
    torch.library.opcheck(block_sparse_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (20, 33, 33))
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    compiled = torch.compile(lambda *x: block_sparse(*x, mask, 16, causal=True), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), block_sparse(q, k, v, mask, 16, causal=True), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (
            torch.ones(1, 1, 2, 2, dtype=torch.bool),
            {},
            r"block_mask: shape \(1, 1, 2, 2\), must be \(1 or 1, 2 or 1, 1, 1\)",
        ),
        (torch.ones(1, 2, 1, 1), {}, "block_mask: dtype torch.float32, must be torch.bool"),
        (torch.ones(1, 1, 1, 1, dtype=torch.bool), {"mask_block": 48}, "mask_block: got 48, allowed are 16, 32"),
        (
            torch.ones(1, 1, 1, 1, dtype=torch.bool),
            {"mask_block": 16, "BLOCK_N": 32},
            "BLOCK_N: got 32, must divide mask_block, 16",
        ),
        ([[True]], {}, "block_mask: must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments(mask: object, options: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 4, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        block_sparse(x, x, x, mask, **options)
