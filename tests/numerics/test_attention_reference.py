"""The float64 reference, against attention written out one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import flashsim.numerics.layout as layout
from flashsim.errors import InputError
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.inputs import random_inputs
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to
from flashsim.problem import AttentionProblem

Array = NDArray[np.float64]
SMALL = st.integers(0, 6)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def pair_by_pair(q: Array, k: Array, v: Array, mask: str, scale: float) -> tuple[Array, Array]:
    """Softmax of every row with math.exp and math.fsum; no matrix product, no maximum subtracted."""
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    o, lse = np.zeros((batch, seqlen_q, heads_q, head_dim_v)), np.full((batch, heads_q, seqlen_q), -math.inf)
    for b, i, h in np.ndindex(batch, seqlen_q, heads_q):
        kv = [g for g in range(heads_kv) for _ in range(heads_q // heads_kv)][h]
        weights = {
            c: math.exp(scale * math.fsum(x * y for x, y in zip(q[b, i, h], k[b, c, kv], strict=True)))
            for c in range(seqlen_k)
            if mask == "full" or seqlen_k - c >= seqlen_q - i
        }
        if weights:
            total = math.fsum(weights.values())
            lse[b, h, i] = math.log(total)
            o[b, i, h] = [math.fsum(w * v[b, c, kv, d] for c, w in weights.items()) / total for d in range(head_dim_v)]
    return o, lse


@given(
    st.integers(0, 2), SMALL, SMALL, st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 3),
    st.sampled_from(["full", "causal"]), st.sampled_from([None, 0.3, 0.0, -1.0]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_agrees_with_pair_by_pair(
    batch: int, seqlen_q: int, seqlen_k: int, heads_kv: int, group: int, head_dim: int, head_dim_v: int,
    mask: str, scale: float | None, seed: int,
) -> None:  # fmt: skip
    q = normal(seed, batch, seqlen_q, heads_kv * group, head_dim)
    k = normal(seed + 1, batch, seqlen_k, heads_kv, head_dim)
    v = normal(seed + 2, batch, seqlen_k, heads_kv, head_dim_v)
    o, lse = attention_reference(q, k, v, mask, scale)
    o_expected, lse_expected = pair_by_pair(q, k, v, mask, 1 / math.sqrt(head_dim) if scale is None else scale)
    np.testing.assert_allclose(o, o_expected, rtol=1e-12, atol=1e-13, strict=True)
    np.testing.assert_allclose(lse, lse_expected, rtol=1e-12, atol=1e-13, strict=True)


def test_query_heads_share_kv_heads_in_order() -> None:
    """Six query heads on three KV heads whose values are 0, 1 and 2 everywhere."""
    v = np.zeros((1, 5, 3, 2)) + np.arange(3.0)[:, None]
    o, _ = attention_reference(normal(0, 1, 4, 6, 8), normal(1, 1, 5, 3, 8), v)
    np.testing.assert_allclose(o[0, 0, :, 0], [0, 0, 1, 1, 2, 2], atol=1e-15)


def test_rows_that_see_no_key() -> None:
    q, k, v = normal(0, 1, 5, 2, 4), normal(1, 1, 3, 2, 4), normal(2, 1, 3, 2, 4)
    o, lse = attention_reference(q, k, v, "causal")
    assert not o[:, :2].any()
    assert (lse[:, :, :2] == -np.inf).all()
    assert np.isfinite(lse[:, :, 2:]).all()
    np.testing.assert_allclose(o[0, 2], v[0, 0], rtol=1e-15)
    assert not eager_attention(q, k, v, "fp16", "causal")[:, :2].any()


def test_large_scores_do_not_overflow() -> None:
    q = np.full((1, 1, 1, 4), 1e3)
    k = np.array([1e3, -1e3]).reshape(1, 2, 1, 1) * np.ones(4)
    o, lse = attention_reference(q, k, np.array([2.0, 3.0]).reshape(1, 2, 1, 1))
    assert o.item() == 2.0
    assert lse.item() == 2e6


def test_nan_in_a_masked_key_stays_there() -> None:
    q, k, v = normal(0, 1, 3, 1, 4), normal(1, 1, 3, 1, 4), normal(2, 1, 3, 1, 4)
    k[0, 2] = np.nan
    o, lse = attention_reference(q, k, v, "causal")
    assert np.isfinite(o[0, :2]).all()
    assert np.isfinite(lse[0, 0, :2]).all()
    assert np.isnan(o[0, 2]).all()


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_size_of_a_piece_does_not_matter(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(0, 1, 23, 2, 8), normal(1, 1, 17, 1, 8), normal(2, 1, 17, 1, 4)
    whole = attention_reference(q, k, v, mask), eager_attention(q, k, v, "bf16", mask)
    monkeypatch.setattr(layout, "MAX_SCORES", 60)
    cut = attention_reference(q, k, v, mask), eager_attention(q, k, v, "bf16", mask)
    np.testing.assert_allclose(cut[0][0], whole[0][0], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(cut[0][1], whole[0][1], rtol=1e-13)
    np.testing.assert_allclose(cut[1], whole[1], atol=0.02)


def test_shape_errors_name_the_argument() -> None:
    with pytest.raises(InputError) as caught:
        attention_reference(np.zeros((2, 3, 4, 8)), np.zeros((1, 5, 3, 6)), np.zeros((2, 6, 3, 8)), scale=math.nan)
    assert caught.value.problems == (
        "k: batch 1 differs from 2 of q",
        "v: (seqlen, heads) (6, 3) differs from (5, 3) of k",
        "k: head_dim 6 differs from 8 of q",
        "k: 3 heads do not divide the 4 of q",
        "scale: must be finite, got nan",
    )
    with pytest.raises(InputError) as caught:
        attention_reference(np.zeros((3, 4, 8)), [["a"]], np.zeros((1, 1, 1, 1)))
    assert caught.value.problems == (
        "q: must have 4 dimensions (batch, seqlen, heads, head_dim), got shape (3, 4, 8)",
        "k: must be an array of numbers, got list",
    )
    with pytest.raises(InputError) as caught:
        attention_reference(np.zeros((1, 1, 0, 0)), np.zeros((1, 1, 0, 0)), np.zeros((1, 1, 0, 1)))
    assert caught.value.problems == (
        "q: head_dim must be at least 1, got 0",
        "q: must have at least 1 head, got 0",
        "k: 0 heads do not divide the 0 of q",
    )
    with pytest.raises(InputError, match="unknown mask 'causl', did you mean 'causal'"):
        attention_reference(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), "causl")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_eager_rounds_where_unfused_attention_does(dtype: str) -> None:
    """Two keys, one head dim, 200 queries: every rounding written out, in fp32 between them."""
    q, k, v = (round_to(normal(seed, 1, n, 1, 1), dtype) for seed, n in ((3, 200), (4, 2), (5, 2)))
    s = round_to(np.float32(0.7) * (q.reshape(-1, 1) * k.ravel()).astype(np.float32), dtype).astype(np.float32)
    e = np.exp(s - s.max(axis=1, keepdims=True))
    p = round_to(e / e.sum(axis=1, keepdims=True), dtype).astype(np.float32)
    expected = round_to((p * v.ravel().astype(np.float32)).sum(axis=1, dtype=np.float32), dtype)
    np.testing.assert_array_equal(eager_attention(q, k, v, dtype, scale=0.7).ravel(), expected)


def test_random_inputs() -> None:
    p = AttentionProblem(
        batch=2, heads_q=6, heads_kv=3, seqlen_q=50, seqlen_k=70, head_dim=32, head_dim_v=16, dtype="bf16"
    )
    q, k, v = random_inputs(p, seed=1)
    assert (q.shape, k.shape, v.shape) == ((2, 50, 6, 32), (2, 70, 3, 32), (2, 70, 3, 16))
    for x in (q, k, v):
        assert x.dtype == np.float64
        np.testing.assert_array_equal(round_to(x, "bf16"), x)
        assert abs(x.std() - 1) < 0.05
        assert abs(x.mean()) < 0.05
    np.testing.assert_array_equal(random_inputs(p, seed=1)[2], v)
    assert not np.array_equal(random_inputs(p, seed=2)[2], v)
    assert 2.8 < random_inputs(p, seed=1, scale=3.0)[0].std() < 3.2
