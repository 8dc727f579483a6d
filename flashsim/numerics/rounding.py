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
    """`precision` counts the hidden bit; `min_exponent` is that of the smallest normal number, 2**min_exponent."""

    precision: int
    min_exponent: int
    max: float
    saturates: bool

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a value in the normal range: half a unit in the last place."""
        return 2.0**-self.precision

    @property
    def tiny_roundoff(self) -> float:
        """Largest absolute error of rounding a value below the normal range: half the smallest subnormal."""
        return 2.0 ** (self.min_exponent - self.precision)


# IEEE 754 binary16 and binary32; bfloat16; "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1.
FORMATS = {
    "fp16": Format(11, -14, 65504.0, saturates=False),
    "bf16": Format(8, -126, (2 - 2**-7) * 2.0**127, saturates=False),
    "fp32": Format(24, -126, (2 - 2**-23) * 2.0**127, saturates=False),
    "e4m3": Format(4, -6, 448.0, saturates=True),
    "e5m2": Format(3, -14, 57344.0, saturates=True),
}


def round_to(x: ArrayLike, dtype: str) -> Float:
    """`x` rounded to nearest, ties to even, in `dtype`: fp16, bf16, fp32, e4m3 or e5m2; same shape, float64.

    Subnormals are kept, and so are signed zeros and NaN. A value that rounds beyond the largest finite one becomes
    infinite in fp16, bf16 and fp32; the fp8 formats saturate, infinity included, as PTX `cvt.rn.satfinite` does.
    Raises InputError if `dtype` is unknown.
    """
    if dtype not in FORMATS:
        raise InputError(f"dtype: {unknown('dtype', dtype, FORMATS)}")
    form = FORMATS[dtype]
    values = np.asarray(x, dtype=np.float64)
    exponent = np.frexp(values)[1]  # values = f * 2**exponent, 1/2 <= |f| < 1
    ulp = np.maximum(exponent, form.min_exponent + 1) - form.precision
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: Float = np.ldexp(np.rint(np.ldexp(values, -ulp)), ulp)
    limit = form.max if form.saturates else np.inf
    return np.where(np.abs(rounded) > form.max, np.copysign(limit, rounded), rounded)
