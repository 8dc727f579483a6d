"""Rounding, against the table of all numbers of a format and exact rational arithmetic, and against ml_dtypes."""

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
from flashsim.numerics.rounding import FORMATS, round_to, saturate

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
    return math.nan if dtype == "e4m3" else math.copysign(math.inf, x)


def same(result: float, expected: float) -> bool:
    return result == expected or (math.isnan(result) and math.isnan(expected))


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
def test_the_table_is_a_fixed_point(dtype: str) -> None:
    values = np.array(table(dtype))
    np.testing.assert_array_equal(round_to(values, dtype), values)
    np.testing.assert_array_equal(round_to(-values, dtype), -values)
    assert values[-1] == FORMATS[dtype].max


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
@given(data=st.data())
@settings(max_examples=3 * settings().max_examples)
def test_nearest_even_at_midpoints_and_their_neighbors(dtype: str, data: st.DataObject) -> None:
    values = table(dtype)
    index = data.draw(st.integers(0, len(values) - 2))
    midpoint = (values[index] + values[index + 1]) / 2  # exact: float64 has bits to spare
    for x in (midpoint, math.nextafter(midpoint, 0.0), math.nextafter(midpoint, math.inf)):
        for signed in (x, -x):
            assert same(round_to(signed, dtype).item(), nearest(signed, dtype))


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
@given(x=st.one_of(FINITE, st.floats(-1e5, 1e5), st.floats(-1e-4, 1e-4)))
@example(x=65519.999999999996)
@example(x=65520.0)
@example(x=1 + 2**-8 + 2**-40)
@example(x=5e-324)
@settings(max_examples=3 * settings().max_examples)
def test_nearest_anywhere(dtype: str, x: float) -> None:
    result = round_to(x, dtype).item()
    assert same(result, nearest(x, dtype))
    assert math.copysign(1, result) == math.copysign(1, x)


@given(x=FINITE)
@example(x=float(2**128 - 2**103))
@example(x=math.nextafter(float(2**128 - 2**103), 0))
@example(x=2.0**-150)
@example(x=-0.0)
@settings(max_examples=4 * settings().max_examples)
def test_fp32_is_the_hardware_conversion(x: float) -> None:
    with np.errstate(over="ignore"):
        expected = float(np.float32(x))
    assert round_to(x, "fp32").item() == expected


def test_bf16_is_not_rounded_twice() -> None:
    """Float32 cannot hold the last bit, would leave a tie behind, and the tie would go the other way."""
    x = 1 + 2**-8 + 2**-40
    assert float(np.float64(x).astype(np.float32).astype(ml_dtypes.bfloat16)) == 1.0
    assert round_to(x, "bf16").item() == 1 + 2**-7


# The largest finite number, the first float64 that rounds beyond it, and what that becomes. Libraries differ here:
# ml_dtypes 0.6 has these values, torch 2.13 on a CPU saturates in e4m3, infinity included, but not in e5m2.
OVERFLOW = [
    ("fp16", 65504.0, 65520.0, math.inf),
    ("bf16", 255 * 2.0**120, 511 * 2.0**119, math.inf),
    ("fp32", (2**24 - 1) * 2.0**104, (2**25 - 1) * 2.0**103, math.inf),
    ("e4m3", 448.0, math.nextafter(464.0, math.inf), math.nan),  # the tie itself goes to the even 448
    ("e5m2", 57344.0, 61440.0, math.inf),
]


@pytest.mark.parametrize(("dtype", "largest", "beyond", "becomes"), OVERFLOW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflow(dtype: str, largest: float, beyond: float, becomes: float, sign: float) -> None:
    last = math.nextafter(beyond, 0.0)
    assert round_to([sign * largest, sign * last], dtype).tolist() == [sign * largest] * 2
    result = round_to(sign * np.array([beyond, 2 * largest, 1e300, math.inf]), dtype)
    np.testing.assert_array_equal(result, [sign * becomes] * 4)
    assert math.isnan(round_to(math.nan, dtype).item())


@pytest.mark.parametrize(("dtype", "largest", "beyond", "becomes"), OVERFLOW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_saturation(dtype: str, largest: float, beyond: float, becomes: float, sign: float) -> None:
    """It moves what is beyond the largest number and nothing else, and rounding after it is `cvt.rn.satfinite`."""
    below = sign * np.array([0.0, 5e-324, 0.3, 1.0, math.nextafter(largest, 0.0), largest])
    limited = saturate(below, dtype)
    np.testing.assert_array_equal(limited, below)
    np.testing.assert_array_equal(np.signbit(limited), np.signbit(below))
    above = sign * np.array([math.nextafter(largest, math.inf), beyond, 1e300, math.inf])
    for result in (saturate(above, dtype), round_to(saturate(above, dtype), dtype)):
        assert result.tolist() == [sign * largest] * 4
    assert math.isnan(saturate(math.nan, dtype).item())


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
def test_saturation_matters_only_beyond_the_largest_number(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    inputs = every[np.abs(every) <= FORMATS[dtype].max]
    np.testing.assert_array_equal(round_to(saturate(inputs, dtype), dtype), round_to(inputs, dtype))


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, *EIGHT_BIT])
def test_ml_dtypes_from_float32(dtype: str) -> None:
    """Bit for bit at every rounding boundary, its two neighbors in float32 and every number of the format."""
    values = np.array(table(dtype), dtype=np.float32)
    boundaries = values[:-1] + np.diff(values) / 2
    inputs = [values, boundaries, *(np.nextafter(boundaries, np.float32(to)) for to in (0, np.inf))]
    for x in (*inputs, *(-x for x in inputs)):
        expected = x.astype((SIXTEEN_BIT | EIGHT_BIT)[dtype]).astype(np.float64)
        np.testing.assert_array_equal(round_to(x, dtype).view(np.uint64), expected.view(np.uint64))


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
    with pytest.raises(InputError, match=r"dtype: unknown dtype 'e4m4', did you mean 'e4m3'\?"):
        saturate(1.0, "e4m4")
