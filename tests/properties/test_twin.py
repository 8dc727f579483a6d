"""The tile-loop twin is attention, however it is cut into tiles: in fp32 it differs from float64 by fp32 roundings."""

from __future__ import annotations

import numpy as np
import pytest
import twin
from twin_cases import Case

from flashsim.numerics.fp8 import quantize
from flashsim.numerics.gradients import attention_gradients_reference
from flashsim.numerics.reference import attention_reference


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("seqlens", [(1, 1), (40, 57), (57, 40), (64, 64)])
@pytest.mark.parametrize("blocks", [(16, 16), (1, 24), (32, 5)])
@pytest.mark.parametrize("last_first", [False, True])
def test_in_fp32_the_twin_is_attention(
    mask: str, seqlens: tuple[int, int], blocks: tuple[int, int], last_first: bool
) -> None:
    """Normal numbers: a few dozen roundings of 6e-8 leave 1e-5 of values of size 1, and of gradients of size 10."""
    case = Case("forward", "fp32", mask, "normal", 2, (4, 2), seqlens, (16, 24), blocks, last_first, 0.3)
    q, k, v, do = case.tensors()
    o, lse = twin.forward(q, k, v, "fp32", mask, 0.3, *blocks, last_first)
    o_ref, lse_ref = attention_reference(q, k, v, mask, 0.3)
    np.testing.assert_allclose(o, o_ref, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, lse_ref, rtol=0, atol=1e-5)
    found = twin.backward(q, k, v, o, lse, do, "fp32", mask, 0.3, *blocks)
    for mine, expected in zip(found, attention_gradients_reference(q, k, v, do, mask, 0.3), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4)


def test_the_order_of_the_keys_does_not_matter_where_nothing_is_rounded() -> None:
    """Scores of 0 and integer values: sums are exact, so tiles and their order leave no trace."""
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, 20, 2, 8)), rng.standard_normal((1, 64, 1, 8)).astype(np.float16).astype(float)
    v = rng.integers(-8, 9, (1, 64, 1, 8)).astype(float)
    results = [
        twin.forward(q, k, v, "fp16", "full", None, *blocks, last_first)
        for blocks in ((16, 16), (1, 3), (8, 64), (32, 5))
        for last_first in (False, True)
    ]
    for o, lse in results:
        np.testing.assert_array_equal(o, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_fp8_of_numbers_that_fp8_has(mask: str) -> None:
    """Where quantizing is exact and each row sees one kind of key, so is the twin."""
    q, k = np.ones((1, 24, 2, 8)), np.ones((1, 40, 1, 8))
    v = np.broadcast_to(np.array([1.0, -2, 3, 448, 0.5, -0.25, 7, 0]), (1, 40, 1, 8))
    o, lse = twin.forward_fp8(quantize(q, 8), quantize(k, 16), quantize(v, 16), "fp16", mask, None, False)
    np.testing.assert_allclose(o, np.broadcast_to(v[:, :1], o.shape), rtol=2**-11)
    np.testing.assert_allclose(lse, attention_reference(q, k, v, mask)[1], rtol=1e-6)
