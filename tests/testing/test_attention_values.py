"""Each kind of values is what it says, exact in its dtype, replayable, and made only when it is needed."""

from __future__ import annotations

import pickle
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.masks import parse_mask
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to
from flashsim.problem import AttentionProblem
from flashsim.testing import KINDS, AttentionCase, attention_cases, attention_inputs, cases

Array = NDArray[np.float64]
DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])
SEEDS = range(3)
MASKED = {"full": False, "causal": True}


def case_of(kind: str, dtype: str = "fp16", seed: int = 0, **fields: Any) -> AttentionCase:
    """Two KV heads with two query heads each, causal with more keys than queries, unless `fields` say otherwise."""
    sizes: dict[str, Any] = {
        "batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 37, "seqlen_k": 101, "head_dim": 32, "head_dim_v": 16,
        "mask": "causal",
    }  # fmt: skip
    return AttentionCase(AttentionProblem(dtype=dtype, **(sizes | fields)), kind, seed)


def dots(case: AttentionCase) -> Array:
    """q . k of all pairs, (batch, heads, seqlen_q, seqlen_k), before the softmax scale."""
    k = np.repeat(case.k, case.problem.heads_per_kv, axis=2)
    return np.einsum("bihd,bjhd->bhij", case.q, k)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_kind_is_exact_in_its_dtype(kind: str, dtype: str, seed: int) -> None:
    case = case_of(kind, dtype, seed)
    assert [x.shape for x in case.qkv] == [(2, 37, 4, 32), (2, 101, 2, 32), (2, 101, 2, 16)]
    for x, narrow in zip(case.qkv, case.numpy(), strict=True):
        assert x.dtype == np.float64
        assert np.all(np.isfinite(x))
        np.testing.assert_array_equal(round_to(x, dtype), x)
        assert narrow.dtype == {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
        np.testing.assert_array_equal(narrow.astype(np.float64), x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_makes_the_values(kind: str) -> None:
    again, other = case_of(kind), case_of(kind, seed=1)
    for x, y in zip(case_of(kind).qkv, again.qkv, strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.array_equal(again.v, other.v) == (kind == "zeros")


def spread(x: Array) -> float:
    return float(x.std())


@pytest.mark.parametrize(("kind", "factors"), [("normal", (1, 1, 1)), ("scaled", (3, 3, 3)), ("overflow", (5, 3, 3))])
@pytest.mark.parametrize("seed", SEEDS)
def test_normal_values_have_their_scale(kind: str, factors: tuple[float, ...], seed: int) -> None:
    for x, factor in zip(case_of(kind, seed=seed).qkv, factors, strict=True):
        assert 0.9 * factor < spread(x) < 1.1 * factor
        assert abs(x.mean()) < 0.1 * factor


@DTYPES
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 256])
@pytest.mark.parametrize("lengths", [(1, 1), (37, 101)])
def test_huge_scores_leave_fp16_and_the_inputs_do_not(
    dtype: str, seed: int, head_dim: int, lengths: tuple[int, int]
) -> None:
    case = case_of("huge_scores", dtype, seed, head_dim=head_dim, seqlen_q=lengths[0], seqlen_k=lengths[1])
    assert np.abs(dots(case)).min() > 65504
    assert max(np.abs(x).max() for x in case.qkv) < 1000
    if lengths != (1, 1):
        assert dots(case).min() < 0 < dots(case).max()


@DTYPES
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_ones_give_the_mean_of_the_values_that_a_row_sees(dtype: str, mask: str) -> None:
    case = case_of("ones", dtype, mask=mask)
    allowed = parse_mask(mask).allowed(np.arange(37), np.arange(101), 37, 101)
    v = np.repeat(case.v, 2, axis=2)
    mean = np.stack([v[:, row].mean(axis=1) for row in allowed], axis=1)
    np.testing.assert_allclose(attention_reference(*case.qkv, mask)[0], mean, atol=1e-12)
    assert spread(mean) > 0.01


def test_constants_and_zeros() -> None:
    case = case_of("constant")
    assert [spread(x) for x in case.qkv] == [0, 0, 0]
    assert len({float(x.flat[0]) for x in case.qkv} | {0.0}) == 4
    assert not any(x.any() for x in case_of("zeros").qkv)


@pytest.mark.parametrize("seed", SEEDS)
def test_outliers_are_few(seed: int) -> None:
    for x in case_of("outliers", seed=seed).qkv:
        far = np.abs(x) > 5
        assert 0.5 * x.size / 200 < far.sum() <= x.size / 200 + 1
        assert 0.9 < spread(x[~far]) < 1.1


def tile_maxima(case: AttentionCase, block: int) -> Array:
    """Of each row and KV tile, (..., tiles)."""
    s = dots(case)
    return np.stack([s[..., n : n + block].max(axis=3) for n in range(0, s.shape[3], block)], axis=3)


@DTYPES
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_tile_or_none_changes_the_maximum(dtype: str, block: int, seed: int) -> None:
    rising = tile_maxima(case_of("rising", dtype, seed, mask="full"), block)
    assert np.all(np.diff(rising, axis=3) > 0)
    falling = tile_maxima(case_of("falling", dtype, seed, mask="full"), block)
    assert np.all(np.diff(falling, axis=3) < 0)


@DTYPES
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_of_other_rows_are_so_negative_that_their_exp_is_zero(dtype: str, seed: int) -> None:
    case = case_of("negative_rows", dtype, seed)
    s = (dots(case) * case.problem.softmax_scale).astype(np.float32)
    assert not np.exp(s[:, :, ::2]).any()
    assert np.all(np.exp(s[:, :, 1::2]) > 0)
    assert np.all(np.ptp(s, axis=3) > 0)


@DTYPES
@pytest.mark.parametrize("seed", SEEDS)
def test_one_key_dominates(dtype: str, seed: int) -> None:
    case = case_of("dominant_key", dtype, seed, mask="full")
    s = dots(case) * case.problem.softmax_scale
    p = np.exp(s - s.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    assert p.max(axis=3).min() > 0.99
    keys = p.argmax(axis=3)
    assert np.all(keys == keys[:, :, :1])  # the same for all rows of a head ...
    assert len(np.unique(keys)) > 1  # ... and not in all heads


def test_equal_kv_in_all_batches() -> None:
    own, shared = case_of("normal"), AttentionCase(case_of("normal").problem, shared_kv=True)
    assert not np.array_equal(own.k[0], own.k[1])
    for x, y in zip(shared.qkv[1:], own.qkv[1:], strict=True):
        np.testing.assert_array_equal(x[0], x[1])
        np.testing.assert_array_equal(x[0], y[0])
    np.testing.assert_array_equal(shared.q, own.q)


def test_a_case_is_a_small_value_and_its_text_makes_it_again() -> None:
    case = case_of("outliers", seed=7)
    assert case.q.any()  # its arrays are made; they are no part of the value
    again = eval(repr(case))
    assert again == case
    assert hash(again) == hash(case)
    assert len(repr(case)) < 300
    assert pickle.loads(pickle.dumps(case)) == case
    assert case != case_of("outliers", seed=8)


def test_hypothesis_prints_kind_and_seed() -> None:
    @settings(max_examples=5, database=None, derandomize=True)
    @given(attention_cases(kinds=("rising",)))
    def fails(case: AttentionCase) -> None:
        raise ValueError(case.q.shape)

    with pytest.raises(ValueError, match=r"\(1, 1, 1, 16\)") as caught:
        fails()
    text = "".join(caught.value.__notes__)
    assert "kind='rising'" in text
    assert "seed=0" in text
    assert "array" not in text
    assert len(text) < 500


def test_what_a_kernel_writes_into_its_inputs_does_not_change_the_case() -> None:
    case = case_of("normal")
    before = case.q.copy()
    for x in case.numpy():
        x[:] = 0
    np.testing.assert_array_equal(case.q, before)
    with pytest.raises(ValueError, match="read-only"):
        case.q[:] = 0


def test_drawing_a_case_makes_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_inputs(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cases, "make_inputs", make_inputs)
    found = find(attention_cases(), lambda case: case.problem.seqlen_k > 100, random=Random(0))
    assert found.kind == "normal"
    assert found.seed == 0
    with pytest.raises(AssertionError):
        _ = found.q


def test_all_kinds_masks_and_dtypes_come_together() -> None:
    seen = set()

    @settings(max_examples=1000, derandomize=True, database=None)
    @given(attention_cases())
    def collect(case: AttentionCase) -> None:
        assert case.causal is MASKED[case.mask]
        seen.add((case.kind, case.mask, case.dtype))

    collect()
    assert seen == {(kind, mask, dtype) for kind in KINDS for mask in MASKED for dtype in ("fp16", "bf16")}


@given(st.data())
def test_inputs_of_a_problem_are_of_that_problem(data: st.DataObject) -> None:
    problem = case_of("normal", "bf16").problem
    case = data.draw(attention_inputs(problem, kinds=("ones", "zeros"), shared_kv=True))
    assert case.problem is problem
    assert case.kind in ("ones", "zeros")
    assert case.shared_kv
    assert (case.dtype, case.mask) == ("bf16", "causal")


def test_unknown_kinds() -> None:
    problem = case_of("normal").problem
    with pytest.raises(InputError, match="unknown kind 'norml', did you mean 'normal'"):
        AttentionCase(problem, "norml")
    with pytest.raises(InputError, match=r"kinds: unknown kind 'norml'.*\nkinds: unknown kind 'zero', did you mean"):
        attention_cases(kinds=("normal", "norml", "zero"))
    with pytest.raises(InputError, match="kinds: got 'normal', must name at least one"):
        attention_inputs(problem, kinds="normal")
