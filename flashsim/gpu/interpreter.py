"""Corrections of Triton's interpreter, so that what a test finds on a CPU is the kernel's doing.

    # conftest.py
    import os
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

    from flashsim.gpu.interpreter import correct_interpreter
    correct_interpreter()

From then on every kernel of the process runs so. The interpreter of Triton 3.6 to 3.9

- keeps bf16 as bit patterns and adds, multiplies, sums and converts these as if they were integers;
- truncates where fp32 is rounded to bf16;
- rounds fp32 to fp8 half away from zero, loses the carry into the exponent, and wraps around beyond the largest number;
- reads the NaN of e4m3 as 480;
- refuses a `range` with a bound that is known at run time only (3.6 with NumPy 2.4 and later).

Corrected, bf16 is computed in fp32 and rounded once for each operation, sums and scans once at their end; conversions
round to nearest even; fp8 saturates, as cvt.rn.satfinite does (PTX ISA, "cvt"). Not corrected, because no number is
wrong: programs run one after the other, fp32 products are exact fp32 whatever `input_precision` says, ex2 is exact.

All of this replaces private names of `triton.runtime.interpreter`. `correct_interpreter` therefore looks for each of
them first and runs small kernels afterwards, and raises where anything does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

from flashsim.errors import FlashsimError, InputError

Array = NDArray[Any]
NUMPY: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
"""Of the types whose conversions saturate."""
USED = {
    "": ("TensorHandle", "_convert_float", "_patch_lang_tensor", "_ir.ROUNDING_MODE.RTZ"),
    "InterpreterBuilder": ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot", "cast_impl"),
    "ReduceOps": ("sum", "to_tensor"),
    "ScanOps": ("cumsum", "cumprod"),
}
"""The private names that are replaced or called, of the module and of its classes."""
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_corrected = False


class InterpreterMismatch(FlashsimError):
    """This Triton's interpreter is not the one that the corrections were written for."""


def correct_interpreter() -> None:
    """Correct the interpreter of this process; once is enough, and more do nothing.

    Raises InputError if kernels are compiled in this process (TRITON_INTERPRET was not set, or not before triton was
    imported), and InterpreterMismatch, naming what does not fit, if a name has moved or a probe gives a wrong number.
    """
    global _corrected
    _check_interpreted()
    if not _corrected:
        moved = [f"{name} has moved" for name in _moved()]
        if moved:
            raise InterpreterMismatch(_message(moved))
        _replace()
        _corrected = True
        self_test()


def self_test() -> None:
    """Raise InterpreterMismatch if anything is computed wrongly that the corrections are for."""
    wrong = wrong_probes()
    if wrong:
        raise InterpreterMismatch(_message([f"{name}: {what}" for name, what in wrong.items()]))


def wrong_probes() -> dict[str, str]:
    """Runs a small kernel for each correction. What was wrong, by its name; empty where the interpreter is right.

    Raises InputError as `correct_interpreter` does.
    """
    _check_interpreted()
    wrong = {}
    for name, probe in PROBES.items():
        try:
            with np.errstate(all="ignore"):
                got, expected = probe()
        except Exception as error:  # whatever a private name that means something else leads to
            wrong[name] = f"{type(error).__name__}: {error}"
        else:
            different = torch.nonzero((got != expected) & ~(got.isnan() & expected.isnan()))
            if len(different):
                at = tuple(different[0].tolist())
                wrong[name] = f"got {got[at].item()!r}, expected {expected[at].item()!r}"
    return wrong


def _check_interpreted() -> None:
    # A function of Triton's own library tells what triton was when it was imported; the setting can be changed later.
    if not isinstance(tl.max, interpreter.InterpretedFunction):
        raise InputError(
            "TRITON_INTERPRET: kernels are compiled in this process. Set TRITON_INTERPRET=1 in the environment before "
            "anything imports triton, at the top of the outermost conftest.py for instance"
        )


def _message(lines: list[str]) -> str:
    what = "\n".join(f"- {line}" for line in lines)
    return f"the corrections do not fit the interpreter of triton {triton.__version__}:\n{what}"


def _moved() -> list[str]:
    missing = object()
    moved = []
    for owner, names in USED.items():
        for name in names:
            found: Any = interpreter
            for part in (*owner.split("."), *name.split(".")):
                found = getattr(found, part, missing) if part else found
            if found is missing:
                moved.append(f"triton.runtime.interpreter.{f'{owner}.' if owner else ''}{name}")
    return moved


def _is_bf16(x: Any) -> bool:
    """Of a handle or a tensor."""
    return bool(x.dtype.scalar == tl.bfloat16)


def _convert(data: Array, source: Any, to: Any) -> Array:
    """Values of type `source` as Triton stores them to those of type `to`, to nearest even."""
    with np.errstate(all="ignore"):
        x = data.view(NUMPY[source])
        if to in LARGEST:
            x = np.clip(x.astype(np.float32), -LARGEST[to], LARGEST[to])
        stored: Array = x.astype(NUMPY[to])
    return stored.view(f"u{stored.itemsize}")


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle(_convert(handle.data, tl.bfloat16, tl.float32).view(np.float32), tl.float32)


def _narrow(handle: Any) -> Any:
    return interpreter.TensorHandle(_convert(handle.data, tl.float32, tl.bfloat16), tl.bfloat16)


def _retyped(x: Any, handle: Any) -> Any:
    """Tensor `x` with another handle."""
    return tl.tensor(handle, tl.block_type(handle.dtype, list(x.shape)) if x.shape else handle.dtype)


def _replace() -> None:
    builder = interpreter.InterpreterBuilder
    convert_float, patch_lang_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    create_fma, create_dot, cast_impl = builder.create_fma, builder.create_dot, builder.cast_impl

    def new_convert_float(data: Array, source: Any, to: Any, rounding: Any) -> Array:
        source, to = source.scalar, to.scalar
        if source not in NUMPY or to not in NUMPY or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return np.asarray(convert_float(data, source, to, rounding))
        return _convert(data, source, to)

    def new_cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16:
            return cast_impl(self, _widen(src), dst_type)
        with np.errstate(all="ignore"):
            data = src.data if _is_bf16(src) else src.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    def new_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return binary_op(self, lhs, rhs, op)
        if op in COMPARISONS:
            return interpreter.TensorHandle(op(_widen(lhs).data, _widen(rhs).data), tl.int1)
        return _narrow(binary_op(self, _widen(lhs), _widen(rhs), op))

    def new_unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _narrow(unary_op(self, _widen(arg), op)) if _is_bf16(arg) else unary_op(self, arg, op)

    def new_ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or not _is_bf16(other):  # a selection moves bits
            return ternary_op(self, lhs, rhs, other, op)
        return _narrow(ternary_op(self, _widen(lhs), _widen(rhs), _widen(other), op))

    def new_create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return create_fma(self, x, y, z)
        return _narrow(create_fma(self, _widen(x), _widen(y), _widen(z)))

    def new_create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any, **options: Any) -> Any:
        product = create_dot(self, _widen(a), _widen(b), _widen(d), *rest, **options)
        return _narrow(product) if _is_bf16(d) else product

    def of_sum(original: Any) -> Any:
        def corrected(self: Any, x: Any) -> Any:
            if not _is_bf16(x):
                return original(self, x)
            result = original(self, _retyped(x, _widen(x.handle)))
            if isinstance(result, list):  # of a scan
                return [_retyped(y, _narrow(y.handle)) for y in result]
            return _retyped(result, _narrow(result.handle))

        return corrected

    def new_patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float, interpreter._patch_lang_tensor = new_convert_float, new_patch_lang_tensor
    builder.binary_op, builder.unary_op, builder.ternary_op = new_binary_op, new_unary_op, new_ternary_op
    builder.create_fma, builder.create_dot, builder.cast_impl = new_create_fma, new_create_dot, new_cast_impl
    if not hasattr(builder, "get_bf16"):  # a constant; from 3.7 on it is there
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
    interpreter.ReduceOps.sum = of_sum(interpreter.ReduceOps.sum)
    interpreter.ScanOps.cumsum = of_sum(interpreter.ScanOps.cumsum)
    interpreter.ScanOps.cumprod = of_sum(interpreter.ScanOps.cumprod)


# Probes: kernels of one program on N elements, and what a GPU gives


@triton.jit  # type: ignore[untyped-decorator]
def _arithmetic(X: Any, Y: Any, Out: Any, N: tl.constexpr) -> None:
    n = tl.arange(0, N)
    x, y = tl.load(X + n), tl.load(Y + n)
    tl.store(Out + n, x * y)
    tl.store(Out + N + n, x + y)
    tl.store(Out + 2 * N + n, -x)
    tl.store(Out + 3 * N + n, tl.where(x < y, x, y - 1.5))


@triton.jit  # type: ignore[untyped-decorator]
def _dot(X: Any, Y: Any, Out: Any, N: tl.constexpr) -> None:
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    tl.store(Out + at, tl.dot(tl.load(X + at), tl.trans(tl.load(Y + at))))


@triton.jit  # type: ignore[untyped-decorator]
def _sums(X: Any, Out: Any, N: tl.constexpr) -> None:
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x = tl.load(X + at)
    tl.store(Out + n, tl.sum(x, 1))
    tl.store(Out + N + n, tl.max(x, 0))
    tl.store(Out + 2 * N + at, tl.cumsum(x, 1))


@triton.jit  # type: ignore[untyped-decorator]
def _cast(X: Any, Out: Any, N: tl.constexpr) -> None:
    n = tl.arange(0, N)
    tl.store(Out + n, tl.load(X + n).to(Out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _count(Out: Any, limit: Any) -> None:
    total = 0
    for n in range(limit):
        total += n
    tl.store(Out, total)


SIDE = 16
Pair = tuple[torch.Tensor, torch.Tensor]


def _values(dtype: torch.dtype, seed: int, size: int = SIDE * SIDE, factor: float = 1.0) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * factor).to(dtype)


def _probe_arithmetic() -> Pair:
    x, y = _values(torch.bfloat16, 1), _values(torch.bfloat16, 2)
    out = torch.zeros(4 * x.numel(), dtype=x.dtype)
    _arithmetic[(1,)](x, y, out, x.numel())
    return out, torch.cat([x * y, x + y, -x, torch.where(x < y, x, y - 1.5)])


def _probe_dot() -> Pair:
    # Small integers: exact in whatever order they are added.
    x, y = (_values(torch.bfloat16, n, factor=3).round().reshape(SIDE, SIDE) for n in (3, 4))
    out = torch.zeros(SIDE, SIDE)
    _dot[(1,)](x, y, out, SIDE)
    return out, x.float() @ y.float().T


def _probe_sums() -> Pair:
    x = _values(torch.bfloat16, 5, factor=3).round().reshape(SIDE, SIDE)
    out = torch.zeros(2 * SIDE + x.numel(), dtype=x.dtype)
    _sums[(1,)](x, out, SIDE)
    wide = x.float()
    return out, torch.cat([wide.sum(1), wide.amax(0), wide.cumsum(1).flatten()]).to(x.dtype)


def _probe_cast(source: torch.dtype, to: torch.dtype, *factors: float) -> Callable[[], Pair]:
    def probe() -> Pair:
        special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.9999, -1.94, 0.0])
        x = torch.cat([*(_values(source, 6, 256 - 8, factor) for factor in factors), special.to(source)])
        x = torch.cat([x, x.new_zeros(triton.next_power_of_2(x.numel()) - x.numel())])
        out = torch.zeros(x.numel(), dtype=to)
        _cast[(1,)](x, out, x.numel())
        expected = x.float()
        if to in (torch.float8_e4m3fn, torch.float8_e5m2):
            most = torch.finfo(to).max
            expected = expected.clamp(-most, most)  # NaN stays
        return out.float(), expected.to(to).float()

    return probe


def _probe_range() -> Pair:
    out = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](out, 5)
    return out, torch.tensor([10], dtype=torch.int32)


PROBES: dict[str, Callable[[], Pair]] = {
    "bf16 arithmetic": _probe_arithmetic,
    "bf16 dot": _probe_dot,
    "bf16 sum and scan": _probe_sums,
    "fp32 to bf16": _probe_cast(torch.float32, torch.bfloat16, 1.0),
    "bf16 to fp32": _probe_cast(torch.bfloat16, torch.float32, 1.0),
    "fp16 to bf16": _probe_cast(torch.float16, torch.bfloat16, 1.0),
    "bf16 to fp16": _probe_cast(torch.bfloat16, torch.float16, 1.0),
    "fp32 to e4m3": _probe_cast(torch.float32, torch.float8_e4m3fn, 1.0, 300.0, 0.003),
    "fp32 to e5m2": _probe_cast(torch.float32, torch.float8_e5m2, 1.0, 4e4, 1e-5),
    "bf16 to e4m3": _probe_cast(torch.bfloat16, torch.float8_e4m3fn, 1.0),
    "e4m3 to bf16": _probe_cast(torch.float8_e4m3fn, torch.bfloat16, 1.0),
    "range with a runtime bound": _probe_range,
}
"""By what they ask for: kernels and the numbers they must give, bit for bit."""
