"""Results of kernels, whatever library they come from, as float64 NumPy arrays. No such library is imported."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashsim.numerics.layout import Float
from flashsim.testing.layouts import is_torch

DTYPE_NAMES = {"float16": "fp16", "bfloat16": "bf16"}


def dtype_of(x: Any) -> str | None:
    """fp16 or bf16, if `x` is an array of that (NumPy with ml_dtypes, torch, jax); else None."""
    return DTYPE_NAMES.get(str(getattr(x, "dtype", None)).removeprefix("torch."))


def to_float64(x: Any) -> Float:
    """The values of `x`, exactly: a torch tensor of any dtype, device and strides, or what NumPy reads as an array.

    Raises TypeError for anything that is not an array of real numbers.
    """
    if is_torch(x):
        if x.is_complex():
            raise TypeError(f"got a tensor of {x.dtype}")
        # NumPy has no bf16, so the conversion is torch's.
        return np.asarray(x.detach().to("cpu").double().numpy())
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "OcSUMm":
            return array.astype(np.float64)
        kind = f"with elements of type {array.dtype}"
    except (TypeError, ValueError):
        kind = "that NumPy does not read as an array"
    raise TypeError(f"got {type(x).__name__} {kind}")
