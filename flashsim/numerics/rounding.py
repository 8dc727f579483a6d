"""Rounding of float64 values to the formats that kernels compute in; the result is float64 again.

One formula serves all formats: scale the value so that one unit in the last place is 1, round to an integer, scale
back. Both scalings are by powers of two and exact, hence a single rounding, to nearest, ties to even. Going through
float32, as `ml_dtypes` does from float64, rounds twice: 1 + 2**-8 + 2**-40 would become 1 in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flashsim.errors import InputError, unknown
from flashsim.numerics.layout import Float


class Format(NamedTuple):
    """`precision` counts the hidden bit; `min_exponent` is that of the smallest normal number, 2**min_exponent.

    `overflow` is what a value that rounds beyond `max` becomes, up to its sign: infinity, or NaN where the format has
    no infinity.
    """

    precision: int
    min_exponent: int
    max: float
    overflow: float

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a value in the normal range: half a unit in the last place."""
        return 2.0**-self.precision

    @property
    def tiny_roundoff(self) -> float:
        """Largest absolute error of rounding a value below the normal range: half the smallest subnormal."""
        return 2.0 ** (self.min_exponent - self.precision)


# IEEE 754 binary16 and binary32; bfloat16; "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1. e4m3 is what
# PTX calls so, and other libraries e4m3fn: no infinity, and the pattern of a magnitude of 480 is NaN.
FORMATS = {
    "fp16": Format(11, -14, 65504.0, overflow=np.inf),
    "bf16": Format(8, -126, (2 - 2**-7) * 2.0**127, overflow=np.inf),
    "fp32": Format(24, -126, (2 - 2**-23) * 2.0**127, overflow=np.inf),
    "e4m3": Format(4, -6, 448.0, overflow=np.nan),
    "e5m2": Format(3, -14, 57344.0, overflow=np.inf),
}


def _checked(x: ArrayLike, dtype: str) -> tuple[Float, Format]:
    if dtype not in FORMATS:
        raise InputError(f"dtype: {unknown('dtype', dtype, FORMATS)}")
    return np.asarray(x, dtype=np.float64), FORMATS[dtype]


def round_to(x: ArrayLike, dtype: str) -> Float:
    """`x` rounded to nearest, ties to even, in `dtype`: fp16, bf16, fp32, e4m3 or e5m2; same shape, float64.

    Subnormals are kept, and so are signed zeros and NaN. What rounds beyond the largest finite number becomes infinite,
    and NaN in e4m3; conversions to fp8 on a GPU avoid both: see `saturate`. Raises InputError if `dtype` is unknown.
    """
    values, form = _checked(x, dtype)
    exponent = np.frexp(values)[1]  # values = f * 2**exponent, 1/2 <= |f| < 1
    ulp = np.maximum(exponent, form.min_exponent + 1) - form.precision
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: Float = np.ldexp(np.rint(np.ldexp(values, -ulp)), ulp)
    return np.where(np.abs(rounded) > form.max, np.copysign(form.overflow, rounded), rounded)


def saturate(x: ArrayLike, dtype: str) -> Float:
    """`x` with what lies beyond the largest finite number of `dtype`, infinity included, moved to it; NaN stays NaN.

    Not rounded. `round_to(saturate(x, dtype), dtype)` is PTX's `cvt.rn.satfinite`, and to fp8 PTX converts with
    `.satfinite` only (PTX ISA, cvt). Raises InputError if `dtype` is unknown.
    """
    values, form = _checked(x, dtype)
    limited: Float = np.clip(values, -form.max, form.max)
    return limited
