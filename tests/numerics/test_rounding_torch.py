"""Rounding, bit for bit against torch on the CPU, wherever the result is finite.

Beyond that, formats and versions of torch differ; test_rounding.py writes the values out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashsim.numerics.rounding import round_to

TORCH_NAME = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}
LAST = {
    "fp16": np.nextafter(np.float32(65520), np.float32(0)),
    "bf16": np.nextafter(np.float32(511 * 2.0**119), np.float32(0)),
    "fp32": np.finfo(np.float32).max,
    "e4m3": np.float32(464),
    "e5m2": np.nextafter(np.float32(61440), np.float32(0)),
}
"""The last float32 that rounds to a finite number."""
NARROW = ["fp16", "bf16", "e4m3", "e5m2"]


@pytest.fixture(scope="module")
def torch() -> Any:
    """Imported here, not at the top: that takes seconds, and every worker of a parallel run collects every file."""
    return pytest.importorskip("torch", reason="torch is not installed: the conversions of torch are not compared")


def every_pattern(torch: Any, dtype: str) -> Any:
    """The tensor of all bit patterns of a 16- or 8-bit format."""
    wide = dtype in ("fp16", "bf16")
    bits = torch.arange(2**16 if wide else 2**8, dtype=torch.int32)
    return bits.to(torch.uint16 if wide else torch.uint8).view(getattr(torch, TORCH_NAME[dtype]))


def bits(x: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Tells -0 from 0, and takes one NaN for another."""
    return np.where(np.isnan(x), np.nan, x).view(np.uint64)


def assert_rounds_as_torch(torch: Any, inputs: Any, dtype: str) -> None:
    """`inputs` is a tensor, which torch converts without a step between."""
    expected = inputs.to(getattr(torch, TORCH_NAME[dtype])).double().numpy()
    result = round_to(inputs.double().numpy(), dtype)
    np.testing.assert_array_equal(bits(result), bits(expected))


@pytest.mark.parametrize("dtype", [*NARROW, "fp32"])
@pytest.mark.parametrize("source", ["fp16", "bf16"])
def test_every_16_bit_input(torch: Any, source: str, dtype: str) -> None:
    inputs = every_pattern(torch, source)
    assert len(inputs) == 2**16
    size = inputs.double().abs()
    in_range = size.isnan() | (size <= float(LAST[dtype]))
    assert_rounds_as_torch(torch, inputs[in_range], dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_rounding_boundary(torch: Any, dtype: str) -> None:
    """Every number of the format, every midpoint between two neighbors, and the float32 numbers next to it.

    The last boundary is the one beyond which the result is not finite.
    """
    numbers = np.unique(np.abs(every_pattern(torch, dtype).double().numpy()))
    finite = numbers[np.isfinite(numbers)].astype(np.float32)
    assert len(finite) == {"fp16": 31 * 2**10, "bf16": 255 * 2**7, "e4m3": 127, "e5m2": 31 * 2**2}[dtype]
    midpoint = finite[:-1] + np.diff(finite) / 2
    around = [np.nextafter(midpoint, np.float32(to)) for to in (0, np.inf)]
    positive = np.concatenate([finite, midpoint, *around, [LAST[dtype]]])
    assert positive.dtype == np.float32
    assert_rounds_as_torch(torch, torch.from_numpy(np.concatenate([positive, -positive])), dtype)


def test_fp32_boundaries(torch: Any) -> None:
    """Every 65521st float32 number, the midpoint above it, and the float64 numbers next to that."""
    numbers = np.arange(0, 0x7F7FFFFF, 65521, dtype=np.uint32)
    below, above = numbers.view(np.float32), (numbers + 1).view(np.float32)
    midpoint = (below.astype(np.float64) + above) / 2
    around = [np.nextafter(midpoint, to) for to in (0, np.inf)]
    positive = np.concatenate([below, midpoint, *around])
    assert_rounds_as_torch(torch, torch.from_numpy(np.concatenate([positive, -positive])), "fp32")
