"""Rounding, against the table of all numbers of a format and exact rational arithmetic."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.numerics.rounding import FORMATS, round_to

SIXTEEN_BIT = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
EIGHT_BIT = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


@cache
def table(dtype: str) -> list[float]:
    """All finite values >= 0 of `dtype`, ascending; the index of each is its bit pattern."""
    if dtype in SIXTEEN_BIT:
        bits, form = np.arange(2**15, dtype=np.uint16), SIXTEEN_BIT[dtype]
    else:
        bits, form = np.arange(2**7, dtype=np.uint8), EIGHT_BIT[dtype]
    with np.errstate(invalid="ignore"):
        values = bits.view(form).astype(np.float64)
    return [float(x) for x in values if math.isfinite(x)]


def nearest(x: float, dtype: str) -> float:
    """Nearest value in the table, exactly, the even bit pattern where two are equally near."""
    values = table(dtype)
    size = Fraction(abs(x))
    # One step beyond the largest: what lies halfway to it or further overflows.
    beyond = 2 * Fraction(values[-1]) - Fraction(values[-2])
    above = bisect.bisect_left(values, abs(x))
    low = Fraction(values[max(0, above - 1)])
    high = Fraction(values[above]) if above < len(values) else beyond
    if size - low == high - size:
        index = max(0, above - 1) if (above - 1) % 2 == 0 else above
    else:
        index = above if high - size < size - low else max(0, above - 1)
    if index < len(values):
        return math.copysign(values[index], x)
    return math.copysign(values[-1] if dtype in EIGHT_BIT else math.inf, x)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
def test_the_table_is_a_fixed_point(dtype: str) -> None:
    values = np.array(table(dtype))
    np.testing.assert_array_equal(round_to(values, dtype), values)
    np.testing.assert_array_equal(round_to(-values, dtype), -values)
    assert values[-1] == FORMATS[dtype].max


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_nearest_even_at_midpoints_and_their_neighbors(dtype: str, data: st.DataObject) -> None:
    values = table(dtype)
    index = data.draw(st.integers(0, len(values) - 2))
    midpoint = (values[index] + values[index + 1]) / 2  # exact: float64 has bits to spare
    for x in (midpoint, math.nextafter(midpoint, 0.0), math.nextafter(midpoint, math.inf)):
        for signed in (x, -x):
            assert round_to(signed, dtype).item() == nearest(signed, dtype)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
@given(x=st.one_of(FINITE, st.floats(-1e5, 1e5), st.floats(-1e-4, 1e-4)))
@example(x=65519.999999999996)
@example(x=65520.0)
@example(x=1 + 2**-8 + 2**-40)
@example(x=5e-324)
@settings(max_examples=150, deadline=None)
def test_nearest_anywhere(dtype: str, x: float) -> None:
    result = round_to(x, dtype).item()
    assert result == nearest(x, dtype)
    assert math.copysign(1, result) == math.copysign(1, x)


@given(x=FINITE)
@example(x=float(2**128 - 2**103))
@example(x=math.nextafter(float(2**128 - 2**103), 0))
@example(x=2.0**-150)
@example(x=-0.0)
@settings(max_examples=200, deadline=None)
def test_fp32_is_the_hardware_conversion(x: float) -> None:
    with np.errstate(over="ignore"):
        expected = float(np.float32(x))
    assert round_to(x, "fp32").item() == expected


def test_bf16_is_not_rounded_twice() -> None:
    """Float32 cannot hold the last bit, would leave a tie behind, and the tie would go the other way."""
    x = 1 + 2**-8 + 2**-40
    assert float(np.float64(x).astype(np.float32).astype(ml_dtypes.bfloat16)) == 1.0
    assert round_to(x, "bf16").item() == 1 + 2**-7


@pytest.mark.parametrize(
    ("dtype", "limit"), [("fp16", math.inf), ("bf16", math.inf), ("fp32", math.inf), ("e4m3", 448.0), ("e5m2", 57344.0)]
)
def test_overflow_infinity_and_nan(dtype: str, limit: float) -> None:
    assert round_to([1e300, -1e300, math.inf, -math.inf], dtype).tolist() == [limit, -limit, limit, -limit]
    assert math.isnan(round_to(math.nan, dtype).item())


def test_shape_is_kept_and_the_argument_is_not_changed() -> None:
    x = np.full((2, 0, 3), 0.1)
    y = np.full((2, 3), 0.1)
    assert round_to(x, "fp16").shape == (2, 0, 3)
    assert round_to(y, "fp16").tolist() == [[float(np.float16(0.1))] * 3] * 2
    assert (y == 0.1).all()


def test_unit_roundoff() -> None:
    assert (FORMATS["fp16"].unit_roundoff, FORMATS["fp16"].tiny_roundoff) == (2.0**-11, 2.0**-25)
    for dtype in (*SIXTEEN_BIT, *EIGHT_BIT):
        assert FORMATS[dtype].tiny_roundoff == table(dtype)[1] / 2


def test_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"dtype: unknown dtype 'bf61', did you mean 'bf16'\?"):
        round_to(1.0, "bf61")
