"""flashsim: simulate, check and validate attention kernel schedules.

    import flashsim
    problem = flashsim.AttentionProblem(batch=4, heads_q=16, seqlen_q=8448, head_dim=128)
    result = flashsim.simulate(problem, schedule="fa3", gpu="h100-sxm5")
    result.time_us, result.tflops, result.bound_by

Names are imported when they are first used, so that `import flashsim` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsim.analysis.accuracy import accuracy
    from flashsim.check.prove import check
    from flashsim.devices import device_names, load_device
    from flashsim.errors import (
        Deadlock,
        EndlessRun,
        FlashsimError,
        Hazard,
        Infeasible,
        InputError,
        Race,
        SimulationError,
    )
    from flashsim.problem import AttentionProblem
    from flashsim.result import Result
    from flashsim.schedules import load_schedule, schedule_names
    from flashsim.simulate import simulate

    __version__: str

__all__ = [
    "AttentionProblem",
    "Deadlock",
    "EndlessRun",
    "FlashsimError",
    "Hazard",
    "Infeasible",
    "InputError",
    "Race",
    "Result",
    "SimulationError",
    "__version__",
    "accuracy",
    "check",
    "device_names",
    "load_device",
    "load_schedule",
    "schedule_names",
    "simulate",
]

_MODULES = {
    "AttentionProblem": "flashsim.problem",
    "Deadlock": "flashsim.errors",
    "EndlessRun": "flashsim.errors",
    "FlashsimError": "flashsim.errors",
    "Hazard": "flashsim.errors",
    "Infeasible": "flashsim.errors",
    "InputError": "flashsim.errors",
    "Race": "flashsim.errors",
    "Result": "flashsim.result",
    "SimulationError": "flashsim.errors",
    "accuracy": "flashsim.analysis.accuracy",
    "check": "flashsim.check.prove",
    "device_names": "flashsim.devices",
    "load_device": "flashsim.devices",
    "load_schedule": "flashsim.schedules",
    "schedule_names": "flashsim.schedules",
    "simulate": "flashsim.simulate",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module 'flashsim' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flashsim")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


class _Package(ModuleType):
    """The import system binds a submodule to its package; `flashsim.simulate` stays the function for all that."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
