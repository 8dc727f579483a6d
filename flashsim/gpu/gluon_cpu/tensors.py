"""Values of a kernel: scalars with C's division, tensors that nothing changes in place, pointers."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch

from flashsim.errors import Hazard

TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
"""By the names of Triton's dtypes."""


def width(dtype: Any) -> int:
    """Bytes of an element."""
    size: int = TORCH[str(dtype)].itemsize
    return size


class Int(int):
    """A scalar of a kernel. Division truncates, as in C."""

    def to(self, dtype: Any) -> Any:
        return float(self) if TORCH[str(dtype)].is_floating_point else self

    def __floordiv__(self, other: Any) -> Any:
        return _int(self, other, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1))

    def __rfloordiv__(self, other: Any) -> Any:
        return Int(other) // self

    def __mod__(self, other: Any) -> Any:
        return _int(self, other, lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1))

    def __rmod__(self, other: Any) -> Any:
        return Int(other) % self

    def __neg__(self) -> Int:
        return Int(-int(self))


def _int(a: int, b: Any, operation: Callable[[int, int], Any]) -> Any:
    """Int where both are whole numbers; NotImplemented, so that the other side is asked, where not."""
    return Int(operation(int(a), int(b))) if isinstance(b, int) else NotImplemented


def _closed(name: str, swapped: bool) -> Callable[[Int, Any], Any]:
    function = getattr(operator, name)

    def method(self: Int, other: Any) -> Any:
        return _int(self, other, (lambda a, b: function(b, a)) if swapped else function)

    return method


for _name in ("add", "sub", "mul", "and_", "or_", "xor", "lshift", "rshift"):
    for _swapped in (False, True):
        setattr(Int, f"__{'r' * _swapped}{_name.strip('_')}__", _closed(_name, _swapped))


def plain(x: Any) -> Any:
    """What torch takes as an operand."""
    if isinstance(x, Accumulator):
        raise x.early()
    return x.data if isinstance(x, Tensor) else int(x) if isinstance(x, Int) else x


class Tensor:
    """Stands in for `gl.tensor`: immutable, so that `x += y` makes a new one. Layouts are not kept."""

    __slots__ = ("data",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> Any:
        import triton.language as tl

        names = {torch_dtype: name for name, torch_dtype in TORCH.items()}
        return tl.dtype(names[self.data.dtype])

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def T(self) -> Tensor:  # noqa: N802
        return Tensor(self.data.T)

    def to(self, dtype: Any) -> Tensor:
        return Tensor(self.data.to(TORCH[str(dtype)]))

    def __getitem__(self, index: Any) -> Tensor:
        allowed = index if isinstance(index, tuple) else (index,)
        if any(i is not None and i != slice(None) for i in allowed):
            raise TypeError("a tensor can be indexed by None and : only")
        return Tensor(self.data[index])

    def __bool__(self) -> bool:
        if self.data.numel() != 1:
            raise TypeError("a tensor decides which way a program goes")
        return bool(self.data)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    def __neg__(self) -> Tensor:
        return Tensor(-self.data)


def _divided(a: Any, b: Any) -> torch.Tensor:
    a, b = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (a, b))
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        raise TypeError("// of floating point numbers")
    return torch.div(a, b, rounding_mode="trunc")


def _binary(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Tensor, Any], Any]:
    def method(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = (plain(other), self.data) if swapped else (self.data, plain(other))
        return Tensor(function(a, b))

    return method


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne")},
    **{n: getattr(operator, n + "_" * (n in ("and", "or"))) for n in ("and", "or", "xor", "lshift", "rshift")},
    "floordiv": _divided,
    "mod": torch.fmod,
}
for _name, _function in _OPERATORS.items():
    setattr(Tensor, f"__{_name}__", _binary(_function, swapped=False))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Tensor, f"__r{_name}__", _binary(_function, swapped=True))


class Accumulator:
    """The result of a product that has been issued: nothing can be done with it before it has been waited for."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape
        self.operation: Any = None
        self.data: torch.Tensor | None = None

    def early(self) -> Hazard:
        return Hazard(f"the result of {self.operation.what} is used, and nobody has waited for it")

    def to(self, dtype: Any) -> Any:
        raise self.early()

    def __getitem__(self, index: Any) -> Any:
        raise self.early()


def _early(self: Accumulator, *_: Any) -> Any:
    raise self.early()


for _name in _OPERATORS:
    setattr(Accumulator, f"__{_name}__", _early)
    setattr(Accumulator, f"__r{_name}__", _early)


class Pointer:
    """A pointer into a tensor, or a tensor of them; nothing outside that tensor can be reached."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        self.base = base.detach()
        self.offset = offset

    @property
    def dtype(self) -> Any:
        return Tensor(self.base).dtype

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset - other)

    def cells(self, mask: Any, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """(memory, indices, mask, whether this is a scalar): all elements of the tensor, and which are meant.

        Raises Hazard if some element that the mask leaves lies outside.
        """
        base = self.base
        most = sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True)) + 1
        memory = base.as_strided((most if base.numel() else 0,), (1,))
        index = torch.as_tensor(plain(self.offset)).long()
        chosen = torch.as_tensor(True if mask is None else plain(mask)).broadcast_to(index.shape)
        outside = chosen & ((index < 0) | (index >= memory.numel()))
        if builtins.bool(outside.any()):
            raise Hazard(
                f"{where}: element {int(index[outside].flatten()[0])} of a tensor that has {memory.numel()} of them"
            )
        return memory, index, chosen, index.ndim == 0
