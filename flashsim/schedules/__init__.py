"""The algorithms, one file each: nothing but order. `verbs` has what they can say, `base` what a schedule is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from flashsim.errors import InputError, line_of, unknown
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, Switch, switch
from flashsim.watchdog import Stuck, Watchdog

BUILT_IN = {"standard": "Standard", "fa1": "FA1", "fa2": "FA2", "fa3": "FA3", "split_kv": "SplitKV"}
"""File name to class name."""

__all__ = ["Grid", "Kernel", "Role", "Schedule", "Switch", "load_schedule", "schedule_names", "switch"]


class _Loader(SourceFileLoader):
    """Leaves no bytecode beside the user's file, and reads none, which might be that of an earlier text."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def schedule_names() -> tuple[str, ...]:
    """The built-in schedules."""
    return tuple(BUILT_IN)


def load_schedule(name: str) -> type[Schedule]:
    """The schedule class called `name`, or the one in a file: `path/to/file.py:Class` (`:Class` if there are several).

    A schedule file is code: loading it runs it. Raises InputError for an unknown name, a file that cannot be read or
    run, and a class that is not a Schedule.
    """
    if name in BUILT_IN:
        module = importlib.import_module(f"flashsim.schedules.{name}")
        found = getattr(module, BUILT_IN[name])
        assert isinstance(found, type)
        assert issubclass(found, Schedule)
        return found
    path, _, class_name = name.partition(".py:")
    if class_name:
        path += ".py"
    if not path.endswith(".py"):
        raise InputError(unknown("schedule", name, [*BUILT_IN, "path/to/file.py:Class"]))
    return _from_file(Path(path), class_name)


def _from_file(path: Path, class_name: str) -> type[Schedule]:
    if not path.is_file():
        raise InputError(f"schedule file {path} does not exist")
    module_name = f"flashsim_user_schedule_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_Loader(module_name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)  # as it is called in the lines of errors
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        with Watchdog():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"schedule file {path} cannot be run: {type(error).__name__}: {error}") from None
    except Stuck as error:
        raise InputError(f"{line_of(error, within=str(path))}: the file does not come to its end") from None
    own = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Schedule) and value.__module__ == module_name
    }
    if class_name:
        if class_name not in own:
            raise InputError(f"{path}: {unknown('schedule class', class_name, own)}")
        return own[class_name]
    if len(own) != 1:
        raise InputError(f"{path} has {len(own)} schedule classes ({', '.join(own) or 'none'}); name one: {path}:Class")
    return next(iter(own.values()))
