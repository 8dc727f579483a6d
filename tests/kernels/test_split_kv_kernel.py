"""The split-KV kernels: exact for any number of splits, packed heads or not; the combine kernel; how many splits."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, examples  # noqa: E402

from flashsim.numerics.merge import merge_normalized  # noqa: E402
from flashsim.schedules.split_kv import num_splits as splits_of_the_schedule  # noqa: E402
from flashsim.testing import (  # noqa: E402
    AttentionCase,
    Layout,
    assert_attention_close,
    assert_gradients_close,
    attention_cases,
    layouts,
)
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.split_kv import split_kv, split_kv_combine, split_kv_op, splits_heuristic  # noqa: E402

Run = tuple[AttentionCase, dict[str, Any]]
TILES = ((16, 16), (16, 32), (32, 16), (64, 32))
SPLITS = (None, 1, 2, 3, 5, 17)
HEAD_DIMS = (16, 24, 64, 128, 256)


@st.composite
def runs(draw: st.DrawFn, max_flops: float = 2e6, **options: Any) -> Run:
    """A case, tiles and splits. Few queries, and more keys than tiles elsewhere: that is what splits are for."""
    BLOCK_M, BLOCK_N = draw(st.sampled_from(TILES))
    case = draw(attention_cases(tile=(16, BLOCK_N), max_tiles=(2, 6), max_flops=max_flops, **options))
    switches = {"num_splits": draw(st.sampled_from(SPLITS)), "pack_gqa": draw(st.booleans())}
    return case, switches | {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}


@examples()
@given(runs(head_dims=HEAD_DIMS), layouts())
def test_exact(run: Run, layout: Layout) -> None:
    case, options = run
    o, lse = split_kv(*case.torch("cpu", layout), causal=case.causal, return_lse=True, **options)
    assert_attention_close(o, case, lse=lse)


@examples(6, 30, 150)
@given(runs(head_dims=(16, 40)))
def test_exact_in_fp32(run: Run) -> None:
    case, options = run
    q, k, v = (x.float() * FULL_PRECISION for x in case.torch())
    o, lse = split_kv(q, k, v, causal=case.causal, return_lse=True, **options)
    assert_attention_close(o, q, k, v, lse=lse, dtype="fp32", mask=case.mask)


@examples(4, 12, 60)
@given(runs(head_dims=(16, 40), max_flops=1e6))
def test_gradients(run: Run) -> None:
    case, options = run
    leaves = [x.requires_grad_() for x in case.torch()]
    split_kv(*leaves, causal=case.causal, **options).backward(case.torch_do())
    assert_gradients_close([x.grad for x in leaves], case)


@pytest.mark.parametrize("num_splits", [2, 3, 5, 17, 32, 97, 133])
def test_split_is_unsplit(num_splits: int) -> None:
    """In fp32, where only the order of sums differs. 20 KV tiles: with more splits than that, some are empty."""
    q, k, v = torch.randn(1, 3, 2, 16), torch.randn(1, 310, 1, 16), torch.randn(1, 310, 1, 24)
    given = {"causal": True, "return_lse": True, "BLOCK_N": 16}
    split, whole = (split_kv(q, k, v, num_splits=n, **given) for n in (num_splits, 1))
    for mine, other in zip(split, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("group", "seqlen_q"), [(2, 1), (2, 16), (3, 11), (8, 1), (8, 3)])
def test_packed_is_unpacked(group: int, seqlen_q: int) -> None:
    """A tile of 16 rows may begin and end inside of a query's heads."""
    q, k, v = torch.randn(1, seqlen_q, 2 * group, 16), torch.randn(1, 50, 2, 16), torch.randn(1, 50, 2, 16)
    given = {"causal": True, "return_lse": True, "num_splits": 2, "BLOCK_M": 16, "BLOCK_N": 16}
    packed, unpacked = (split_kv(q, k, v, pack_gqa=pack, **given) for pack in (True, False))
    for mine, other in zip(packed, unpacked, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@examples(6, 30, 150)
@given(
    st.sampled_from((2, 3, 5, 16, 17, 133)),
    st.sampled_from((1, 3, 16, 17)),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 2**16),
)
def test_combine_is_the_merge(num_splits: int, seqlen_q: int, empty: float, seed: int) -> None:
    """O and LSE of parts, some of which have no key, are those of `numerics.merge`."""
    rng = np.random.default_rng(seed)
    heads, d_v = 2, 24
    o_part = rng.standard_normal((num_splits, 1, heads, seqlen_q, d_v)).astype(np.float32)
    lse_part = (10 * rng.standard_normal((num_splits, 1, heads, seqlen_q))).astype(np.float32)
    is_empty = rng.random(lse_part.shape) < empty
    lse_part[is_empty], o_part[is_empty] = -np.inf, 0
    parts = [(o.astype(np.float64), lse[..., None].astype(np.float64)) for o, lse in zip(o_part, lse_part, strict=True)]
    expected, expected_lse = reduce(lambda a, b: merge_normalized(*a, *b), parts)

    o, lse = torch.empty(1, seqlen_q, heads, d_v), torch.empty(1, heads, seqlen_q)
    rows = heads * seqlen_q
    split_kv_combine[(triton.cdiv(rows, 16),)](
        torch.from_numpy(o_part), torch.from_numpy(lse_part), o, lse, rows * d_v, rows, *o.stride()[:3],
        num_splits, rows, seqlen_q, heads, D_V=d_v, BLOCK_DV=32, SPLITS=triton.next_power_of_2(num_splits), ROWS=16,
    )  # fmt: skip
    np.testing.assert_allclose(o.transpose(1, 2).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), expected_lse[..., 0], atol=1e-5)


@examples(50, 200, 1000)
@given(st.integers(1, 1000), st.integers(1, 2000), st.integers(1, 300))
def test_as_many_splits_as_the_schedule_has(tiles: int, kv_tiles: int, slots: int) -> None:
    assert splits_heuristic(tiles, kv_tiles, slots) == splits_of_the_schedule(tiles, kv_tiles, slots)


def test_launch_table() -> None:
    """A decoding step, with as many splits as are chosen for it."""
    q, k, v = (torch.randn(2, n, heads, 128, dtype=torch.float16) for n, heads in ((1, 4), (600, 1), (600, 1)))
    o, lse = split_kv(q, k, v, causal=True, return_lse=True)
    assert_attention_close(o, q, k, v, mask="causal", lse=lse)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_compute(batch: int, seqlen_q: int, seqlen_k: int, num_splits: int | None) -> None:
    q, k, v = (torch.randn(batch, n, 2, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    o, lse = split_kv(q, k, v, return_lse=True, num_splits=num_splits)
    assert o.shape == (batch, seqlen_q, 2, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())


def test_a_custom_operator() -> None:
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for n, heads in ((3, 2), (33, 1), (33, 1)))
    torch.library.opcheck(split_kv_op, (q, k, v, None, 0, None, False, 3, True, 16, 16, None, None))


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (3, 33, 33))
    compiled = torch.compile(lambda *x: split_kv(*x, causal=True, num_splits=2), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), split_kv(q, k, v, causal=True, num_splits=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_splits": 0}, "split_kv: num_splits: got 0, allowed are 1 to 1024"),
        ({"num_splits": 1025}, "split_kv: num_splits"),
        ({"BLOCK_N": 48}, "split_kv: BLOCK_N: got 48"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 4, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        split_kv(x, x, x, **options)
