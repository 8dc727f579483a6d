"""The float64 gradients, against finite differences and autograd; eager's; and the rule that accepts a kernel's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.compare import compare_gradients
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]
MASKS = pytest.mark.parametrize("mask", ["full", "causal"])
DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])


def tensors(
    seqlen_q: int = 24, seqlen_k: int = 20, heads: int = 4, heads_kv: int = 2, dtype: str = "fp32", seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """q, k, v and dO; under a causal mask four rows see no key, by default."""
    rng = np.random.default_rng(seed)
    shapes = ((2, seqlen_q, heads, 8), (2, seqlen_k, heads_kv, 8), (2, seqlen_k, heads_kv, 6), (2, seqlen_q, heads, 6))
    q, k, v, do = (round_to(rng.standard_normal(shape), dtype) for shape in shapes)
    return q, k, v, do


@MASKS
@pytest.mark.parametrize("scale", [None, 0.8])
def test_against_finite_differences(mask: str, scale: float | None) -> None:
    """Central differences of sum(O dO) along drawn directions: off by the step's square."""
    *given_, do = tensors()
    gradients = attention_gradients_reference(*given_, do, mask, scale)
    rng, step = np.random.default_rng(1), 1e-5
    for n, gradient in enumerate(gradients):
        for _ in range(5):
            direction = rng.standard_normal(gradient.shape)
            sides = []
            for sign in (1, -1):
                moved = [x + sign * step * direction if i == n else x for i, x in enumerate(given_)]
                sides.append(np.sum(attention_reference(*moved, mask, scale)[0] * do))
            expected = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-7, atol=1e-7)


def torch_gradients(inputs: tuple[Array, ...], mask: str, dtype: str, scale: float) -> Gradients:
    """What autograd makes of unfused attention whose tensors are `dtype`."""
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    q, k, v, do = (torch.tensor(x, dtype=getattr(torch, dtype)).transpose(1, 2) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * (q @ keys.transpose(2, 3))
    if mask == "causal":
        rows, cols = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        hidden = cols > rows + k.shape[2] - q.shape[2]
        scores = scores.masked_fill(hidden, -torch.inf)
        (torch.nan_to_num(torch.softmax(scores, dim=-1)) @ values * do).sum().backward()
    else:
        (torch.softmax(scores, dim=-1) @ values * do).sum().backward()
    return Gradients(*(x.grad.transpose(1, 2).double().numpy() for x in leaves))


@MASKS
def test_against_autograd(mask: str) -> None:
    given_ = tensors()
    expected = torch_gradients(given_, mask, "float64", 8**-0.5)
    for mine, theirs in zip(attention_gradients_reference(*given_, mask), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-13)


@DTYPES
@MASKS
def test_eager_errs_as_autograd_does(mask: str, dtype: str) -> None:
    """The ruler has the right length: its mean errors are within a third of those of PyTorch in the same dtype."""
    given_ = tensors(200, 200, dtype=dtype)
    reference = attention_gradients_reference(*given_, mask)
    theirs = torch_gradients(given_, mask, {"fp16": "float16", "bf16": "bfloat16"}[dtype], 8**-0.5)
    for mine, other, exact in zip(eager_gradients(*given_, dtype, mask), theirs, reference, strict=True):
        assert 0.75 < np.abs(mine - exact).mean() / np.abs(other - exact).mean() < 1.33


def test_heads_of_a_group_add_up() -> None:
    """The gradient of shared keys and values is the sum of those that each query head has for itself."""
    q, k, v, do = tensors(heads=6, heads_kv=2)
    shared = attention_gradients_reference(q, k, v, do)
    own = attention_gradients_reference(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), do)
    np.testing.assert_allclose(shared.dq, own.dq)
    for mine, parts in zip(shared[1:], own[1:], strict=True):
        np.testing.assert_allclose(mine, parts.reshape(2, 20, 2, 3, -1).sum(axis=3), rtol=1e-12)


@DTYPES
def test_rows_that_see_no_key(dtype: str) -> None:
    """They have no gradient and give none: without them, keys and values have the same."""
    q, k, v, do = tensors(dtype=dtype)
    for gradients in (
        attention_gradients_reference(q, k, v, do, "causal"),
        eager_gradients(q, k, v, do, dtype, "causal"),
    ):
        assert not gradients.dq[:, :4].any()
        assert gradients.dq[:, 4:].all(axis=(0, 2, 3))[1:].all()
    whole = attention_gradients_reference(q, k, v, do, "causal")
    cut = attention_gradients_reference(q[:, 4:], k, v, do[:, 4:], "causal")
    np.testing.assert_allclose(whole.dk, cut.dk, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(whole.dv, cut.dv, rtol=1e-12, atol=1e-15)


@MASKS
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    """Few scores at a time give the same gradients, and bounds that are at least those of all at once."""
    given_ = tensors(dtype="fp16")
    whole = attention_gradients_reference(*given_, mask), eager_gradients(*given_, "fp16", mask)
    bounds = gradient_bounds(*given_, "fp16", mask)
    monkeypatch.setattr("flashsim.numerics.layout.MAX_SCORES", 100)
    cut = attention_gradients_reference(*given_, mask), eager_gradients(*given_, "fp16", mask)
    for exact, mine in zip(whole[0], cut[0], strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-12, atol=1e-15)
    for exact, mine in zip(whole[1], cut[1], strict=True):
        np.testing.assert_allclose(mine, exact, rtol=2**-9, atol=2**-14)  # another order of fp32 sums, then rounded
    narrow = gradient_bounds(*given_, "fp16", mask)
    for one, other in zip(bounds.largest, narrow.largest, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2)  # fewer rows in sight, fewer alike
    assert all(1 <= other / one < 3 for one, other in zip(bounds.mean, narrow.mean, strict=True))


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0)])
def test_empty_tensors(seqlens: tuple[int, int]) -> None:
    given_ = tensors(*seqlens)
    gradients = attention_gradients_reference(*given_)
    assert [x.shape for x in gradients] == [x.shape for x in given_[:3]]
    assert not any(x.any() for x in gradients)
    bounds = gradient_bounds(*given_, "fp16")
    assert compare_gradients(gradients, gradients, eager_gradients(*given_, "fp16"), bounds).accepted


def test_do_of_another_shape_is_refused() -> None:
    q, k, v, do = tensors()
    for call in (
        lambda: attention_gradients_reference(q, k, v, do[:, 1:]),
        lambda: eager_gradients(q, k, v, do[..., 1:], "fp16"),
        lambda: gradient_bounds(q, k, v, do[:1], "fp16"),
    ):
        with pytest.raises(InputError, match=r"do: must have the shape of o, \(2, 24, 4, 6\), got"):
            call()
    with pytest.raises(InputError, match="unknown dtype 'fp61'"):
        gradient_bounds(q, k, v, do, "fp61")


@DTYPES
def test_bounds_are_small(dtype: str) -> None:
    """Relative to the gradients' largest values: a few roundings of the dtype, the mean's far below the largest."""
    given_ = tensors(200, 200, dtype=dtype)
    bounds, reference = gradient_bounds(*given_, dtype), attention_gradients_reference(*given_)
    u = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    for largest, mean, exact in zip(*bounds, reference, strict=True):
        assert largest.max() < 8 * u * np.abs(exact).max()
        assert mean < 0.5 * u * np.abs(exact).max()


@DTYPES
def test_scores_that_are_stored(dtype: str) -> None:
    """Unfused attention rounds S and dP, too: with large scores, that is more than all other roundings."""
    given_ = tensors(20, 30, heads=1, heads_kv=1, dtype=dtype)
    given_ = (16 * given_[0], *given_[1:])
    q, k, v, do = (x[:, :, 0] for x in given_)
    s, dp = round_to(q @ k.transpose(0, 2, 1) / 8**0.5, dtype), round_to(do @ v.transpose(0, 2, 1), dtype)
    p = np.exp(s - s.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    ds = p * (dp - np.sum(p * dp, axis=2, keepdims=True)) / 8**0.5
    mine = (ds @ k, ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ do)
    fused, unfused = (gradient_bounds(*given_, dtype, s_dtype=form).largest for form in (None, dtype))
    for one, exact, narrow, wide in zip(mine, attention_gradients_reference(*given_), fused, unfused, strict=True):
        errors = np.abs(one[:, :, None] - exact)
        assert np.any(errors > narrow)
        assert np.all(errors <= wide)


def test_what_is_stored_of_dp_changes_all_of_a_row() -> None:
    """D is summed from it: here the gradient of q comes from a key whose own dP is 0."""
    given_ = [
        round_to(np.array(rows)[None, :, None], "fp16")
        for rows in (
            [[1.0, 0.0]],
            [[0.0, 1.0], [-0.01857, 0.0], [-0.02669, 0.0]],
            [[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0202]],
            [[1.0, 0.99 * 2**-11]],
        )
    ]
    eager, exact = eager_gradients(*given_, "fp16", scale=1.0), attention_gradients_reference(*given_, scale=1.0)
    errors = np.abs(eager.dq - exact.dq)
    assert np.any(errors > gradient_bounds(*given_, "fp16", scale=1.0).largest.dq)
    assert np.all(errors <= gradient_bounds(*given_, "fp16", scale=1.0, s_dtype="fp16").largest.dq)


def spoiled(gradient: Array) -> dict[str, Array]:
    """One thing wrong at a time."""
    one = np.zeros_like(gradient)
    one[0, 9, 1, 3] = 1
    return {
        "NaN": np.where(one, np.nan, gradient),
        "infinite": np.where(one, np.inf, gradient),
        "a zero": np.where(one, 0, gradient),
        "zeros": 0 * gradient,
        "one wrong element": gradient + one * np.abs(gradient).max() / 4,
        "a row lost": gradient * (np.arange(gradient.shape[1]) != 9)[:, None, None],
        "2 % too large": gradient * 1.02,
        "of the other sequence": gradient[::-1],
        "one row too few": gradient[:, :-1],
        "broadcast": gradient[:, :1],
    }


@pytest.mark.parametrize("wrong", spoiled(np.zeros((1, 10, 2, 4))))
@pytest.mark.parametrize("name", Gradients._fields)
@MASKS
def test_spoiled_gradients_are_rejected(wrong: str, name: str, mask: str) -> None:
    given_ = tensors(dtype="fp16")
    reference, bounds = attention_gradients_reference(*given_, mask), gradient_bounds(*given_, "fp16", mask)
    eager = eager_gradients(*given_, "fp16", mask)
    assert compare_gradients(reference, reference, eager, bounds).accepted
    assert compare_gradients(eager, reference, eager, bounds).accepted
    result = compare_gradients(
        reference._replace(**{name: spoiled(getattr(reference, name))[wrong]}), reference, eager, bounds
    )
    assert {clause.what.partition(":")[0] for clause in result.broken} == {name}


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 17, 40]), st.sampled_from([1, 3, 17, 33]))
def test_exact_gradients_are_accepted(seed: int, seqlen_q: int, seqlen_k: int) -> None:
    given_ = tensors(seqlen_q, seqlen_k, dtype="bf16", seed=seed)
    reference, bounds = attention_gradients_reference(*given_, "causal"), gradient_bounds(*given_, "bf16", "causal")
    eager = eager_gradients(*given_, "bf16", "causal")
    assert compare_gradients(reference, reference, eager, bounds).accepted
    assert not compare_gradients(Gradients(*(x + 1 for x in reference)), reference, eager, bounds).accepted
