"""Attention with dropout, against its formulas and autograd with the same bits; and without, the bits of before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.error_terms import FP32_UNIT, dropout_units, share_of_rows
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.philox import SEED, keep
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]
MASKS = pytest.mark.parametrize("mask", ["full", "causal"])
DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])
SHAPES = ((2, 24, 4, 8), (2, 21, 2, 8), (2, 21, 2, 6), (2, 24, 4, 6))
"""q, k, v and dO; under a causal mask three rows see no key."""


def tensors(dtype: str = "fp32", seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [round_to(rng.standard_normal(shape), dtype) for shape in SHAPES]


def kept(p: float, seed: int = SEED) -> NDArray[np.bool_]:
    """(batch, heads, rows, keys)"""
    return np.array([[keep(np.arange(24), np.arange(21), b, h, p, seed) for h in range(4)] for b in range(2)])


@MASKS
@pytest.mark.parametrize(("p", "seed"), [(0.3, SEED), (0.8, 7)])
def test_the_reference_is_the_formula(mask: str, p: float, seed: int) -> None:
    q, k, v, _ = tensors()
    o, lse = attention_reference(q, k, v, mask, dropout=p, dropout_seed=seed)
    plain, plain_lse = attention_reference(q, k, v, mask)
    np.testing.assert_array_equal(lse, plain_lse)
    assert (o != plain).any(axis=3)[:, 4:].all()
    s = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 2, axis=2)) / 8**0.5
    if mask == "causal":
        s = np.where(np.tri(24, 21, -3, dtype=bool), s, -np.inf)
    with np.errstate(invalid="ignore"):
        probabilities = np.nan_to_num(np.exp(s) / np.exp(s).sum(axis=3, keepdims=True))
    expected = np.einsum("bhij,bjhd->bihd", probabilities * kept(p, seed) / (1 - p), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(o, expected, rtol=1e-12, atol=1e-14)


@MASKS
@pytest.mark.parametrize(("p", "seed"), [(0.3, SEED), (0.8, 7)])
def test_gradients_against_finite_differences(mask: str, p: float, seed: int) -> None:
    """Central differences of sum(O dO) along drawn directions, with the same bits."""
    *given_, do = tensors()
    drop: Any = {"dropout": p, "dropout_seed": seed}
    rng, step = np.random.default_rng(1), 1e-5
    for n, gradient in enumerate(attention_gradients_reference(*given_, do, mask, 0.8, **drop)):
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            sides = []
            for sign in (1, -1):
                moved = [x + sign * step * direction if i == n else x for i, x in enumerate(given_)]
                sides.append(np.sum(attention_reference(*moved, mask, 0.8, **drop)[0] * do))
            expected = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-7, atol=1e-7)


def torch_attention(inputs: list[Array], p: float, dtype: str) -> tuple[Array, Gradients]:
    """What autograd makes of unfused attention in `dtype` with dropout as `torch.nn.functional.dropout` has it."""
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    q, k, v, do = (torch.tensor(x, dtype=getattr(torch, dtype)).transpose(1, 2) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    probabilities = torch.softmax(8**-0.5 * (q @ keys.transpose(2, 3)), dim=-1)
    o = probabilities * (torch.tensor(kept(p)).to(q.dtype)) * (1 / (1 - p)) @ values
    (o * do).sum().backward()
    gradients = Gradients(*(x.grad.transpose(1, 2).double().numpy() for x in leaves))
    return o.detach().transpose(1, 2).double().numpy(), gradients


def test_against_autograd() -> None:
    given_ = tensors()
    o, gradients = torch_attention(given_, 0.3, "float64")
    np.testing.assert_allclose(attention_reference(*given_[:3], dropout=0.3)[0], o, rtol=1e-10, atol=1e-13)
    for mine, theirs in zip(attention_gradients_reference(*given_, dropout=0.3), gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-13)


@DTYPES
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_eager_errs_as_autograd_does(dtype: str, p: float) -> None:
    """The ruler has the right length: its mean errors are within a third of those of PyTorch in the same dtype."""
    given_ = tensors(dtype)
    o, gradients = torch_attention(given_, p, {"fp16": "float16", "bf16": "bfloat16"}[dtype])
    mine = (eager_attention(*given_[:3], dtype, dropout=p), *eager_gradients(*given_, dtype, dropout=p))
    exact = (attention_reference(*given_[:3], dropout=p)[0], *attention_gradients_reference(*given_, dropout=p))
    for one, other, true in zip(mine, (o, *gradients), exact, strict=True):
        assert 0.75 < np.abs(one - true).mean() / np.abs(other - true).mean() < 1.33


@DTYPES
def test_eager_rounds_the_dropped_p_again(dtype: str) -> None:
    """P in the dtype, then its product with 1 / (1 - p) in the dtype; V picks three times each of them."""
    keys = np.arange(64)
    q, k = np.ones((1, 1, 1, 1)), round_to(np.linspace(0, 1, 64), dtype).reshape(1, 64, 1, 1)
    bits = keep([0], keys, 0, 0, 0.3)[0]
    s = round_to(k.ravel(), dtype).astype(np.float32)
    exp = np.exp(s - s.max())
    probabilities = round_to(exp / exp.sum(), dtype).astype(np.float32)
    expected = round_to(probabilities * bits * np.float32(1 / 0.7), dtype)
    once = round_to(exp / exp.sum() * bits * np.float32(1 / 0.7), dtype)
    assert (expected != once).any()
    found = eager_attention(q, k, 3 * np.eye(64)[None, :, None], dtype, scale=1.0, dropout=0.3)
    np.testing.assert_array_equal(found.ravel(), round_to(3 * expected, dtype))


@DTYPES
def test_eager_gradients_round_what_is_stored(dtype: str) -> None:
    """One head, line by line: P * w, dP, dP * w and dS, besides what is rounded without dropout."""
    q, k, v, do = (x[:1, :, :1] for x in tensors(dtype))
    found = eager_gradients(q, k, v, do, dtype, scale=0.5, dropout=0.3)
    q, k, v, do = (x[0, :, 0].astype(np.float32) for x in (q, k, v, do))

    def rounded(x: Any) -> NDArray[np.float32]:
        return round_to(x, dtype).astype(np.float32)

    w = keep(np.arange(24), np.arange(21), 0, 0, 0.3) * np.float32(1 / 0.7)
    s = rounded(q @ k.T * np.float32(0.5))
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p = rounded(p / p.sum(axis=1, keepdims=True))
    dp = rounded(rounded(do @ v.T) * w)
    ds = rounded(p * (dp - np.sum(p * dp, axis=1, keepdims=True)))
    expected = rounded(ds @ k * np.float32(0.5)), rounded(ds.T @ q * np.float32(0.5)), rounded(rounded(p * w).T @ do)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine[0, :, 0], other)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "reference": lambda q, k, v, do, mask, **drop: attention_reference(q, k, v, mask, **drop),
    "eager": lambda q, k, v, do, mask, **drop: eager_attention(q, k, v, "bf16", mask, **drop),
    "bounds": lambda q, k, v, do, mask, **drop: rounding_bounds(q, k, v, "bf16", mask, **drop),
    "gradients": lambda q, k, v, do, mask, **drop: attention_gradients_reference(q, k, v, do, mask, **drop),
    "eager gradients": lambda q, k, v, do, mask, **drop: eager_gradients(q, k, v, do, "bf16", mask, **drop),
    "bounds of gradients": lambda q, k, v, do, mask, **drop: gradient_bounds(q, k, v, do, "bf16", mask, **drop),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


def flat(x: Any) -> Array:
    return np.concatenate([flat(part) for part in x]) if isinstance(x, tuple) else np.ravel(x)


@EACH
@MASKS
def test_without_dropout_no_bit_is_made(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing takes longer, nor is anything multiplied or counted otherwise; whatever the seed is."""
    plain = flat(FUNCTIONS[name](*tensors("bf16"), mask))
    for unused in ("layout.keep", "bounds.share_of_rows", "gradient_bounds.share_of_rows"):
        monkeypatch.setattr(f"flashsim.numerics.{unused}", None)
    np.testing.assert_array_equal(flat(FUNCTIONS[name](*tensors("bf16"), mask, dropout=0.0, dropout_seed=5)), plain)


@EACH
@MASKS
def test_dropout_of_nothing_is_no_dropout(name: str, mask: str) -> None:
    """A probability of 2**-40, which drops no element here: off by 2**-40, and by the fp32 roundings in bounds."""
    plain, nearly = (flat(FUNCTIONS[name](*tensors("bf16"), mask, dropout=p)) for p in (0.0, 2.0**-40))
    if name.startswith("bounds"):
        assert (nearly >= plain * (1 - 1e-9)).all()
        assert (nearly <= plain * 1.25).all()  # mean ones, by rows of different sizes
        assert np.mean(nearly > plain * 1.02 + 1e-9) < 0.003
    else:
        np.testing.assert_allclose(nearly, plain, rtol=1e-10, atol=1e-14)


@EACH
@MASKS
def test_pieces_do_not_show(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scores at a time have the same bits. Mean bounds know fewer rows that are alike."""
    whole = FUNCTIONS[name](*tensors("bf16"), mask, dropout=0.3)
    monkeypatch.setattr("flashsim.numerics.layout.MAX_SCORES", 100)
    cut = FUNCTIONS[name](*tensors("bf16"), mask, dropout=0.3)
    if name == "bounds of gradients":
        whole, cut = whole.largest, cut.largest
    tolerance = {"eager": 2.0**-7, "eager gradients": 2.0**-6, "bounds of gradients": 2e-2}.get(name, 1e-12)
    np.testing.assert_allclose(flat(cut), flat(whole), rtol=tolerance, atol=max(1e-14, tolerance * 2**-6))


@EACH
def test_mistakes(name: str) -> None:
    q, k, v, do = tensors("bf16")
    with pytest.raises(InputError) as caught:
        FUNCTIONS[name](q, k[:1], v[:1], do, "full", dropout=1, dropout_seed=2**64)
    assert caught.value.problems == (
        "dropout: got 1, must be a number in [0, 1)",
        "dropout_seed: got 18446744073709551616, must be a whole number from 0 to 2**64 - 1",
        "k: batch 1 differs from 2 of q",
        "v: batch 1 differs from 2 of q",
    )
    with pytest.raises(InputError) as caught:
        FUNCTIONS[name]("q", k, v, do, "full", dropout=-1.0)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["q", "dropout"]


def test_the_factor_in_fp32() -> None:
    """1 / (1 - p) from p in fp32, and a product with it, are off by what is counted, and by no less than a third."""
    rng = np.random.default_rng(0)
    for near_one in (1.0, 2.0**-3, 2.0**-9):
        p, x = (
            1 - near_one * (0.01 + rng.random(100_000)) / 1.01,
            rng.random(100_000).astype(np.float32) + np.float32(0.1),
        )
        product = x * (np.float32(1) / (np.float32(1) - p.astype(np.float32)))
        error = np.abs(product.astype(float) * (1 - p) / x - 1) / FP32_UNIT
        counted = np.array([dropout_units(one) for one in p])
        assert (error <= counted * 1.001).all()  # products of errors
        assert (error > counted / 3).any()
    assert dropout_units(0.0) == 0


@DTYPES
@pytest.mark.parametrize("sharp", [1, 12])
def test_bounds_grow_with_dropout_as_values_do(dtype: str, sharp: int) -> None:
    """Of O: those of attention whose values are w_c v_c, up to the fp32 product.

    With sharp scores there are P that become 0 in fp16.
    """
    q, k, v, _ = tensors(dtype)
    q, bits = sharp * q, kept(0.5)
    bounds = rounding_bounds(q, k, v, dtype, dropout=0.5)
    for b, h in np.ndindex(2, 4):
        for row in range(24):
            values = 2 * v[b, :, h // 2] * bits[b, h, row][:, None]
            alone = rounding_bounds(
                q[b, row, h][None, None, None], k[b, :, h // 2][None, :, None], values[None, :, None], dtype
            )
            product = 2 * dropout_units(0.5) * FP32_UNIT * (np.abs(values).max() + 1)
            assert (bounds.o[b, row, h] >= alone.o[0, 0, 0]).all()
            np.testing.assert_allclose(bounds.o[b, row, h], alone.o[0, 0, 0], atol=product)
    np.testing.assert_array_equal(bounds.lse, rounding_bounds(q, k, v, dtype).lse)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bounds_of_gradients_are_those_of_other_values(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dq and dk for a single row: those without dropout for the values w_c v_c; of dv, w_c times those of v_c.

    But for the fp32 product with 1 / (1 - p), which is not counted here.
    """
    for module in ("error_terms", "gradient_bounds"):
        monkeypatch.setattr(f"flashsim.numerics.{module}.dropout_units", lambda dropout: 0.0)
    for seed in range(5):
        q, k, v, do = (x[:1, :, :1] for x in tensors(dtype, seed))
        q, do = q[:, :1], do[:, :1]
        w = 2.0 * keep([0], np.arange(21), 0, 0, 0.5, seed)[0][:, None, None]
        dropped = gradient_bounds(q, k, v, do, dtype, dropout=0.5, dropout_seed=seed).largest
        alone, plain = gradient_bounds(q, k, w * v, do, dtype).largest, gradient_bounds(q, k, v, do, dtype).largest
        for mine, other in ((dropped.dq, alone.dq), (dropped.dk, alone.dk), (dropped.dv, w * plain.dv)):
            np.testing.assert_allclose(mine, other, rtol=1e-9, atol=2.0**-120)


def test_the_share_of_rows_that_has_errors() -> None:
    sigma = np.zeros((2, 8, 1, 3))
    assert share_of_rows(sigma) == 1
    assert share_of_rows(sigma + 5) == 1
    sigma[1, 3] = 1e-30
    assert share_of_rows(sigma) == pytest.approx(1 / 16)
    sigma[0, :4, 0, 1] = 3e-30
    assert share_of_rows(sigma) == pytest.approx(5 / 16)
    sigma[0, 0] *= 2
    assert share_of_rows(sigma) == pytest.approx(36 / 8 / 16)


def test_mean_bounds_know_the_share_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them each: O's mean error, its root mean square, and the mean errors of the gradients."""
    given_ = tensors("bf16")

    def means() -> Array:
        bounds = rounding_bounds(*given_[:3], "bf16", dropout=0.3)
        return np.array([bounds.o_mean, bounds.o_rms, *gradient_bounds(*given_, "bf16", dropout=0.3).mean])

    usual = means()
    for n in range(5):
        shares = iter(np.where(np.arange(5) == n, 1e-9, 1.0))
        for module in ("bounds", "gradient_bounds"):
            monkeypatch.setattr(f"flashsim.numerics.{module}.share_of_rows", lambda sizes, it=shares: next(it))
        grown = means() > 1.2 * usual
        np.testing.assert_array_equal(grown, np.arange(5) == n)


def test_all_keys_of_a_row_dropped() -> None:
    """O is 0, as are the row's gradients, and the LSE is what it was; a result that is not 0 is out of bounds."""
    q, k, v, do = tensors("fp16")
    nothing = ~kept(0.9).any(axis=3).transpose(0, 2, 1)
    assert nothing.any()
    o, lse = attention_reference(q, k, v, dropout=0.9)
    assert not o[nothing].any()
    assert np.isfinite(lse).all()
    assert not eager_attention(q, k, v, "fp16", dropout=0.9)[nothing].any()
    assert rounding_bounds(q, k, v, "fp16", dropout=0.9).o[nothing].max() <= 2.0**-25
    for dq in (
        attention_gradients_reference(q, k, v, do, dropout=0.9),
        eager_gradients(q, k, v, do, "fp16", dropout=0.9),
    ):
        assert not dq.dq[nothing].any()
