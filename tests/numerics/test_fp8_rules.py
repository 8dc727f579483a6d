"""FP8: block scales, the emulating twin and the rule that holds a kernel against it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.compare import compare_fp8
from flashsim.numerics.fp8 import emulated_attention, fp8_bounds, quantize
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]


def fp8_case(seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    shapes = ((2, 40, 4, 32), (2, 60, 2, 32), (2, 60, 2, 16))
    q, k, v = (quantize(rng.standard_normal(shape), 16).values for shape in shapes)
    return q, k, v


def test_quantization() -> None:
    """One scale for each block, codes of e4m3 up to 448, relative errors of at most half a unit in the last place."""
    x = np.random.default_rng(0).standard_normal((2, 37, 3, 8)) * np.linspace(0.01, 100, 37)[:, None, None]
    x[:, 16:32, 1] = 0
    blocks = quantize(x, 16)
    assert blocks.scales.shape == (2, 3, 3)
    np.testing.assert_array_equal(blocks.codes, round_to(blocks.codes, "e4m3"))
    largest = np.abs(blocks.codes[:, :32]).reshape(2, 2, 16, 3, 8).max(axis=(2, 4))
    np.testing.assert_array_equal(largest, np.where(np.arange(2)[:, None] * [0, 1, 0], 0, 448)[None].repeat(2, axis=0))
    np.testing.assert_array_equal(blocks.scales, round_to(blocks.scales, "fp32"))
    scales = np.repeat(blocks.scales, 16, axis=1)[:, :37, :, None]
    assert (np.abs(blocks.values - x) <= 2**-4 * np.abs(x) + 2**-10 * scales).all()
    with pytest.raises(
        InputError, match="x: must have 4 dimensions, got shape \\(8,\\)\nblock: must be at least 1, got 0"
    ):
        quantize(np.ones(8), 0)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_fp8_results(mask: str) -> None:
    """What is exact, and what rounds P as the twin does, is accepted; what is spoiled is not."""
    q, k, v = fp8_case()
    exact, twin = attention_reference(q, k, v, mask), emulated_attention(q, k, v, "bf16", mask)
    bounds = fp8_bounds(q, k, v, "bf16", mask)
    assert compare_fp8(*exact, *exact, twin, bounds).accepted
    assert compare_fp8(twin, exact[1], *exact, twin, bounds).accepted
    assert 0.001 < np.abs(twin - exact[0]).max() < bounds.o.max()
    o, lse = exact
    row = np.arange(40)[:, None, None] == 30
    wrong = {
        "NaN": (np.where(row, np.nan, o), lse),
        "zeros": (0 * o, lse),
        "a row of zeros": (np.where(row, 0, o), lse),
        "twice": (2 * o, lse),
        "the other sequence": (o[::-1], lse),
        "wrong shape": (o[:, :-1], lse),
        "LSE off by 1e-3": (o, lse + 1e-3),
    }
    for name, result in wrong.items():
        assert not compare_fp8(*result, *exact, twin, bounds).accepted, name
    far = exact[0] + 2 * bounds.o_rms * np.sign(exact[0]) + 2 * np.abs(twin - exact[0]).mean()
    assert "O: L2 distance from the fp8 twin" in [
        x.what for x in compare_fp8(far, exact[1], *exact, twin, bounds).broken
    ]


def test_small_probabilities_survive_in_fp8() -> None:
    """40 keys of probability 5e-4 have all the value. Scaled by 256 their P is a number of e4m3; as it is, it is 0."""
    q, k, v = np.ones((1, 1, 1, 1)), np.zeros((1, 41, 1, 1)), np.ones((1, 41, 1, 1))
    k[0, 0], v[0, 0] = 7.6, 0
    reference = attention_reference(q, k, v)
    bounds = fp8_bounds(q, k, v, "bf16")
    twin = emulated_attention(q, k, v, "bf16")
    assert compare_fp8(twin, reference[1], *reference, twin, bounds).accepted
    flushed = emulated_attention(q, k, v, "bf16", p_scale=1.0)
    assert not flushed.any()
    assert not compare_fp8(flushed, reference[1], *reference, twin, bounds).accepted
    unscaled = fp8_bounds(q, k, v, "bf16", p_scale=1.0)
    assert compare_fp8(flushed, reference[1], *reference, flushed, unscaled).accepted


def test_quantization_per_tensor() -> None:
    """One scale for all sequences, heads and rows; the codes are those of the whole tensor as a single block."""
    x = np.random.default_rng(1).standard_normal((2, 37, 3, 8))
    x[1, 5, 2, 7] = -70
    quantized = quantize(x, None)
    assert quantized.scales.shape == (2, 1, 3)
    assert (quantized.scales == round_to(70 / 448, "fp32")).all()
    assert quantized.codes.min() == -448
    one_block = quantize(x.reshape(1, -1, 1, 8), 10**6)
    np.testing.assert_array_equal(quantized.codes, one_block.codes.reshape(x.shape))
    np.testing.assert_array_equal(quantized.values, one_block.values.reshape(x.shape))
    for empty in ((2, 0, 3, 8), (0, 5, 3, 8)):
        assert quantize(np.zeros(empty), None).values.shape == empty
