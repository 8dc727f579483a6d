"""What the assertions are given: the caller's arrays, checked all at once, and the kernel's results."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashsim.errors import InputError, unknown
from flashsim.masks import parse_mask
from flashsim.numerics.layout import Float, check_inputs
from flashsim.numerics.philox import SEED, dropout_problems
from flashsim.numerics.rounding import round_to
from flashsim.testing.arrays import dtype_of, to_float64
from flashsim.testing.cases import NUMPY_DTYPES, AttentionCase

DTYPES = (*NUMPY_DTYPES, "fp32")
"""fp32 only where it is asked for: arrays of it may hold values of another dtype."""


class Arguments(NamedTuple):
    """q, k, v and, for gradients, dO as float64, each exact in `dtype`."""

    q: Float
    k: Float
    v: Float
    do: Float
    dtype: str
    mask: str
    dropout: float
    dropout_seed: int

    @property
    def described(self) -> str:
        """What messages say of the arguments beside shapes."""
        dropout = f", dropout {self.dropout:g}, dropout_seed {self.dropout_seed}" if self.dropout else ""
        return f"{self.dtype}, mask {self.mask}{dropout}"


def of_case(case: AttentionCase, **given: Any) -> Arguments:
    """The case's. Raises InputError for anything that is given beside it."""
    twice = [f"{name}: comes with the case, and cannot be given" for name, x in given.items() if x is not None]
    if twice:
        raise InputError(twice)
    return Arguments(*case.qkv, case.do, case.dtype, case.mask, case.dropout, case.dropout_seed)


def check_arguments(
    arrays: dict[str, Any],
    result: Any,
    dtype: str | None,
    mask: str | None,
    scale: float | None,
    dropout: float | None,
    dropout_seed: int | None,
) -> Arguments:
    """`arrays` has q, k, v and perhaps do. Raises InputError with all that is wrong."""
    dtype = _dtype(arrays, result) if dtype is None else dtype
    mask = "full" if mask is None else mask
    dropout, dropout_seed = 0.0 if dropout is None else dropout, SEED if dropout_seed is None else dropout_seed
    problems: list[str] = []
    if dtype not in DTYPES:
        problems.append(f"dtype: {unknown('dtype', dtype, DTYPES)}")
    try:
        parse_mask(mask)
    except InputError as error:
        problems += error.problems
    problems += dropout_problems(dropout, dropout_seed)
    read: dict[str, Float] = {}
    for name, x in arrays.items():
        try:
            read[name] = to_float64(x)
        except TypeError as error:
            problems.append(f"{name}: must be an array of numbers, {error}")
        else:
            problems += _unreadable(name, read[name], dtype)
    if {"q", "k", "v"} <= set(read):
        problems += _misshapen(read, scale)
    if problems:
        raise InputError(problems)
    do = read.get("do", np.zeros(0))
    return Arguments(read["q"], read["k"], read["v"], do, dtype, mask, float(dropout), int(dropout_seed))


def _dtype(arrays: dict[str, Any], result: Any) -> str:
    """The dtype of the inputs if it is a narrow one, else that of the result."""
    names = {dtype_of(x) for x in arrays.values()}
    if names == {None}:
        names = {dtype_of(result)}
    found = names.pop()
    if names or found is None:
        given = (arrays | {"o": result}).items()
        types = ", ".join(f"{name} {getattr(x, 'dtype', type(x).__name__)}" for name, x in given)
        raise InputError(f"dtype: must be given (allowed: {', '.join(DTYPES)}), since the arrays do not say: {types}")
    return found


def _unreadable(name: str, array: Float, dtype: str) -> list[str]:
    """What a kernel could not have read as it stands there."""
    wrong = ~np.isfinite(array)
    if np.any(wrong):
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        return [f"{name}: must be finite, and is {array[at]} at {at}"]
    if dtype not in DTYPES:
        return []
    lost = array[round_to(array, dtype) != array]
    if not lost.size:
        return []
    return [
        f"{name}: {lost.size} of {array.size} values are none of {dtype}, such as {float(lost[0])!r}; "
        "give what the kernel reads"
    ]


def _misshapen(read: dict[str, Float], scale: float | None) -> list[str]:
    try:
        check_inputs(read["q"], read["k"], read["v"], scale)
    except InputError as error:
        return list(error.problems)
    shape = (*read["q"].shape[:3], read["v"].shape[3])
    if "do" in read and read["do"].shape != shape:
        return [f"do: must have the shape of o, {shape}, got {read['do'].shape}"]
    return []


BSHD = "(batch, seqlen, heads, head_dim)"
BHS = "(batch, heads, seqlen)"


def check_result(name: str, x: Any, shape: tuple[int, ...], axes: str) -> Float:
    """The result as float64. Raises AssertionError for anything but an array of that shape."""
    __tracebackhide__ = True
    try:
        array = to_float64(x)
    except TypeError as error:
        raise AssertionError(f"{name} is no array of numbers: {error}") from None
    if array.shape != shape:
        exchanged = array.ndim == len(shape) and np.swapaxes(array, 1, 2).shape == shape
        hint = "; seqlen and heads are exchanged" if exchanged else ""
        raise AssertionError(f"{name} has shape {array.shape}, and must have {shape}, which is {axes}{hint}")
    return array
