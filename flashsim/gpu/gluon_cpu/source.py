"""Kernel source made to run on the CPU: the same code objects, with other globals."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from typing import Any

from triton.language.core import constexpr
from triton.runtime.jit import ConstexprFunction, JITFunction

from flashsim.errors import SimulationError
from flashsim.gpu.gluon_cpu.memory import BarrierArray, SharedView
from flashsim.gpu.gluon_cpu.scheduler import MARK, source_line

AGGREGATE = "__gluon_cpu_aggregate__"
MODULES = ("mbarrier", "tma", "hopper")
"""Modules of Triton whose names come before those of their operations."""
ITERATORS = ("range", "static_range")
"""Operations that are classes there."""


class Namespace:
    """Stands in for a module of Triton."""

    def __init__(self, source: Source, module: types.ModuleType) -> None:
        self._source = source
        self._module = module

    def __getattr__(self, name: str) -> Any:
        # By the name here: Triton's interpreter, where it has run in this process, has left other functions under it.
        key = operation_key(self._module.__name__, name)
        found = self._source.operations.get(key) or self._source.stand_in(getattr(self._module, name))
        setattr(self, name, found)
        return found


def operation_key(module: str, name: str) -> str:
    last = module.split(".")[-1]
    return f"{last}.{name}" if last in MODULES else name


class Source:
    """Stand-ins for all that kernel source refers to, each made once."""

    def __init__(self, operations: dict[str, Any]) -> None:
        self.operations = operations
        self._made: dict[int, Any] = {}
        self._globals: dict[int, dict[str, Any]] = {}
        self._kept: list[object] = []

    def stand_in(self, value: Any) -> Any:
        """What takes the place of a value that kernel source refers to; most values stay what they are."""
        if value is constexpr:
            return lambda x: x
        if isinstance(value, constexpr):
            return value.value
        if id(value) not in self._made:
            self._kept.append(value)  # so that its id stays its own
            self._made[id(value)] = self._make(value)
        return self._made[id(value)]

    def _make(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return Namespace(self, value) if value.__name__.split(".")[0] == "triton" else value
        if getattr(value, "__triton_aggregate__", False) and isinstance(value, type):
            return self._aggregate(value)
        inside = str(getattr(value, "__module__", "")).split(".")[0] == "triton"
        if isinstance(value, JITFunction):
            return self._operation(value) if inside else self.function(value.fn)
        if inside and isinstance(value, type):
            return self._operation(value) if value.__name__ in ITERATORS else value
        if inside and getattr(value, "__triton_builtin__", False):
            return self._operation(value)
        return value

    def _operation(self, value: Any) -> Any:
        key = operation_key(value.__module__, value.__name__)
        if key in self.operations:
            return self.operations[key]

        def missing(*_: Any, **__: Any) -> Any:
            raise SimulationError(f"{source_line()}: {key} is not among the operations that gluon_cpu has")

        return missing

    def function(self, fn: Any) -> Callable[..., Any]:
        """`fn` with stand-ins for everything that its code finds outside of it."""
        closure = None
        if fn.__closure__:
            closure = tuple(types.CellType(self.stand_in(cell.cell_contents)) for cell in fn.__closure__)
        defaults = tuple(self.stand_in(x) for x in fn.__defaults__ or ()) or None
        made = types.FunctionType(fn.__code__, self._globals_of(fn.__globals__), fn.__name__, defaults, closure)
        made.__kwdefaults__ = fn.__kwdefaults__
        return made

    def _globals_of(self, given: dict[str, Any]) -> dict[str, Any]:
        if id(given) not in self._globals:
            self._kept.append(given)
            made: dict[str, Any] = {}
            self._globals[id(given)] = made  # before it is filled: functions of a module refer to each other
            made[MARK] = True
            made["__builtins__"] = vars(builtins) | {"range": self.operations["range"]}
            for name, value in list(given.items()):
                if not name.startswith("__"):
                    made[name] = self.stand_in(value)
        return self._globals[id(given)]

    def _aggregate(self, given: Any) -> type:
        """A plain class with the fields and methods of an aggregate."""
        fields = list(getattr(given, "__aggregate_fields__", ()))
        init = given.hash_attrs[0]
        explicit = getattr(init, "fn", init)
        members: dict[str, Any] = {}
        for name, member in vars(given).items():
            if isinstance(member, JITFunction | ConstexprFunction):
                members[name] = self.function(member.fn)
        if explicit.__module__.split(".")[0] == "triton":
            defaults = getattr(given, "__aggregate_defaults__", {})
            start = _init_of(given.__name__, fields, {k: self.stand_in(v) for k, v in defaults.items()})
        else:
            start = self.function(explicit)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            start(self, *args, **kwargs)
            _name_fields(self)

        return type(given.__name__, (), members | {"__init__": __init__, AGGREGATE: True})


def _init_of(name: str, fields: list[str], defaults: dict[str, Any]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = defaults | dict(zip(fields, args, strict=False)) | kwargs
        if set(given) != set(fields) or len(args) > len(fields):
            raise TypeError(f"{name} has the fields {', '.join(fields)}, given are {', '.join(given)}")
        for field in fields:
            setattr(self, field, given[field])

    return init


def _name_fields(aggregate: Any, prefix: str = "") -> None:
    """Shared memory is called after the fields that hold it, such as K.full, in messages."""
    for name, value in vars(aggregate).items():
        if isinstance(value, SharedView | BarrierArray):
            value.name = prefix + name
        elif hasattr(type(value), AGGREGATE):
            _name_fields(value, f"{prefix}{name}.")


def constexpr_names(kernel: Any) -> set[str]:
    """The parameters of a kernel that are known when it is compiled."""
    return {parameter.name for parameter in kernel.params if parameter.is_constexpr}
