"""The float64 reference, against attention written out one pair at a time, and against itself on related inputs."""

from __future__ import annotations

import functools
import math
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import flashsim.numerics.layout as layout
from flashsim.errors import InputError
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.inputs import random_inputs
from flashsim.numerics.merge import merge_normalized
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to
from flashsim.problem import AttentionProblem

Array = NDArray[np.float64]


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


class Case(NamedTuple):
    q: Array  # (B, Sq, Hq, D)
    k: Array  # (B, Sk, Hkv, D)
    v: Array  # (B, Sk, Hkv, Dv)
    mask: str
    scale: float


@st.composite
def cases(draw: st.DrawFn, *masks: str) -> Case:
    """Everything may be empty but heads and head_dim; up to three query heads share a KV head."""
    batch, heads_kv, group = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seqlen_q, seqlen_k = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    head_dim, head_dim_v, seed = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 99))
    return Case(
        normal(seed, batch, seqlen_q, heads_kv * group, head_dim),
        normal(seed + 1, batch, seqlen_k, heads_kv, head_dim),
        normal(seed + 2, batch, seqlen_k, heads_kv, head_dim_v),
        draw(st.sampled_from(masks or ("full", "causal"))),
        draw(st.sampled_from([head_dim**-0.5, 0.3, 0.0, -1.0, 10.0])),
    )


def assert_close(result: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    """Scores are below 200, their roundings below 3e-14 and so those of weights; values are below 4, sums short."""
    for mine, other in zip(result, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13, strict=True)


@given(cases())
@settings(max_examples=2 * settings().max_examples)
def test_agrees_with_pair_by_pair(case: Case) -> None:
    expected = pair_by_pair(*case)
    assert_close(attention_reference(*case), expected)
    if case.scale == case.q.shape[3] ** -0.5:
        assert_close(attention_reference(*case[:4]), expected)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 0, 0, 2), (2, 3, 4, 0)])
def test_empty_tensors(sizes: tuple[int, int, int, int], mask: str) -> None:
    """No batch, no queries, no keys, neither, no values; without keys every row gives 0 and -inf."""
    batch, seqlen_q, seqlen_k, head_dim_v = sizes
    v = np.ones((batch, seqlen_k, 3, head_dim_v))
    o, lse = attention_reference(np.ones((batch, seqlen_q, 6, 5)), np.ones((batch, seqlen_k, 3, 5)), v, mask)
    assert (o.shape, lse.shape) == ((batch, seqlen_q, 6, head_dim_v), (batch, 6, seqlen_q))
    assert (o == (seqlen_k > 0)).all()
    assert (np.isneginf(lse) == (seqlen_k == 0)).all()


@given(cases())
def test_each_batch_element_and_each_head_is_alone(case: Case) -> None:
    """To the last bit; a KV head that several query heads share is as good as one for each."""
    q, k, v, mask, scale = case
    o, lse = attention_reference(*case)
    group = q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        one, kv = slice(b, b + 1), slice(h // group, h // group + 1)
        alone = attention_reference(q[one, :, h : h + 1], k[one, :, kv], v[one, :, kv], mask, scale)
        np.testing.assert_array_equal(alone[0], o[one, :, h : h + 1])
        np.testing.assert_array_equal(alone[1], lse[one, h : h + 1])


@given(cases("full"), st.randoms(use_true_random=False))
def test_order_of_the_keys(case: Case, random: Random) -> None:
    order = random.sample(range(case.k.shape[1]), case.k.shape[1])
    assert_close(
        attention_reference(*case._replace(k=case.k[:, order], v=case.v[:, order])), attention_reference(*case)
    )


@given(cases("full"), st.lists(st.integers(0, 6), max_size=4))
def test_merged_parts_are_the_whole(case: Case, cuts: list[int]) -> None:
    """Attention to each part of the keys, some of them empty, merged by their LSE as split-KV decode does."""
    seqlen_k = case.k.shape[1]
    ends = sorted(min(cut, seqlen_k) for cut in cuts)
    parts = []
    for start, stop in zip([0, *ends], [*ends, seqlen_k], strict=True):
        o, lse = attention_reference(*case._replace(k=case.k[:, start:stop], v=case.v[:, start:stop]))
        parts.append((o.transpose(0, 2, 1, 3), lse[..., None]))
    o, lse = functools.reduce(lambda a, b: merge_normalized(*a, *b), parts)
    assert_close((o.transpose(0, 2, 1, 3), lse[..., 0]), attention_reference(*case))


@given(cases("causal"))
def test_a_causal_row_is_full_attention_to_the_keys_before_it(case: Case) -> None:
    """Decode is prefill: the last query alone sees all keys."""
    q, k, v, _, scale = case
    o, lse = attention_reference(*case)
    for i in range(q.shape[1]):
        stop = max(0, i + 1 + k.shape[1] - q.shape[1])
        row = attention_reference(q[:, i : i + 1], k[:, :stop], v[:, :stop], "full", scale)
        assert_close(row, (o[:, i : i + 1], lse[:, :, i : i + 1]))


@given(cases(), st.floats(-100, 100))
def test_shift_of_all_scores(case: Case, shift: float) -> None:
    """One more column, `shift` in Q and 1 in K: each score grows by scale * shift, so does the LSE, and O stays.

    A score of up to 1000 is rounded by up to 1e-13, so a weight by 1e-13 of itself, a few times over.
    """
    q = np.concatenate([case.q, np.full((*case.q.shape[:3], 1), shift)], axis=3)
    k = np.concatenate([case.k, np.ones((*case.k.shape[:3], 1))], axis=3)
    o, lse = attention_reference(*case)
    shifted = attention_reference(*case._replace(q=q, k=k))
    np.testing.assert_allclose(shifted[0], o, atol=1e-11)
    np.testing.assert_allclose(shifted[1], lse + case.scale * shift, rtol=1e-12, atol=1e-11)


@given(cases())
def test_linear_in_v(case: Case) -> None:
    o, lse = attention_reference(*case)
    assert_close(
        attention_reference(*case._replace(v=3 - 2 * case.v)),
        (np.where(lse > -np.inf, 3, 0).transpose(0, 2, 1)[..., None] - 2 * o, lse),
    )


def test_equal_scores_give_the_mean_of_the_values() -> None:
    v = normal(0, 2, 7, 2, 5)
    o, lse = attention_reference(np.ones((2, 3, 4, 16)), np.ones((2, 7, 2, 16)), v)
    np.testing.assert_allclose(o, np.broadcast_to(v.mean(axis=1)[:, None, [0, 0, 1, 1]], o.shape), atol=1e-15)
    np.testing.assert_allclose(lse, 4 + math.log(7), rtol=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    """Key 2 of 3 is bad in one column of one head. Of five causal rows two see no key, two not this one, one does."""
    q, k, v = normal(0, 2, 5, 4, 4), normal(1, 2, 3, 2, 4), normal(2, 2, 3, 2, 4)
    good = attention_reference(q, k, v, "causal")
    v[1, 2, 1, 3] = value
    o, lse = attention_reference(q, k, v, "causal")
    np.testing.assert_array_equal(lse, good[1])
    expected = good[0].copy()
    expected[1, 2:4, 2:, 3] = math.nan  # 0 times the value
    expected[1, 4, 2:, 3] = value
    np.testing.assert_array_equal(o, expected)


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


def test_a_masked_key_is_below_any_score() -> None:
    o, lse = attention_reference(
        np.full((1, 2, 1, 1), 1e150), np.full((1, 2, 1, 1), -1e150), np.array([2.0, 3.0]).reshape(1, 2, 1, 1), "causal"
    )
    assert o.ravel().tolist() == [2.0, 2.5]
    np.testing.assert_allclose(lse, -1e300, rtol=1e-15)


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
