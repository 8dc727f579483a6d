"""Device files: TOML in which every number is `{ value, status, source, note }`, read and checked all at once."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from flashsim.devices.spec import OPTIONAL_SECTIONS, SECTIONS, Citation, DeviceSpec
from flashsim.errors import InputError, unknown

STATUSES: Final = ("datasheet", "measured", "derived", "fitted", "assumed")
ARCHITECTURES: Final = ("ampere", "ada", "hopper")
TEXTS: Final = ("name", "title", "architecture", "compute_capability")
ENTRY_KEYS: Final = ("value", "status", "source", "note")
# Beyond these a rate or a duration is a slip of units, and its reciprocal overflows further on.
SMALLEST, LARGEST = 1e-9, 1e18
AT_MOST: Final = (
    ("clock.datasheet_mhz", "clock.max_mhz"),
    ("smem.per_cta_max_byte", "smem.per_sm_byte"),
    ("memory.l2_share_byte", "memory.l2_byte"),
    ("memory.hbm_byte_per_ns", "memory.hbm_peak_byte_per_ns"),
)


@cache
def device_names() -> tuple[str, ...]:
    """Names of the built-in devices, sorted."""
    files = (entry.name for entry in resources.files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load_device(name_or_path: str | os.PathLike[str]) -> DeviceSpec:
    """The built-in device of that name, or the one in a user's file: a path ends in .toml or contains a separator.

    Raises InputError with every problem of the file, or if there is no such file or name.
    """
    given = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or given.endswith(".toml") or "/" in given or "\\" in given:
        return _parse(given, _read(given))
    if given not in device_names():
        raise InputError(f"{unknown('GPU', given, device_names())}; a file of your own is given as ./my_gpu.toml")
    return _built_in(given)


@cache
def _built_in(name: str) -> DeviceSpec:
    file = resources.files(__package__) / f"{name}.toml"
    return _parse(f"{name}.toml", file.read_text(encoding="utf-8"))


def _read(path: str) -> str:
    try:
        # Editors on Windows may put a byte order mark first.
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (built-in GPUs: {', '.join(device_names())})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse(path: str, text: str) -> DeviceSpec:
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # mostly TOMLDecodeError, which names line and column
        raise InputError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not TOML: nested too deeply") from None
    reader = _Reader(document)
    if reader.problems:
        raise InputError([f"{path}: {problem}" for problem in reader.problems])
    parts: dict[str, Any] = {**reader.texts, **reader.sections}
    return DeviceSpec(**parts, citations=reader.citations)


class _Reader:
    """Walks a parsed device file once and keeps what is usable apart from what is wrong with it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self.citations: dict[str, Citation] = {}
        self._unknown_names("", document, (*TEXTS, *SECTIONS), "entry")
        self.texts = {key: self._text(key, document.get(key, MISSING)) for key in TEXTS}
        self._one_of("architecture", self.texts["architecture"], ARCHITECTURES)
        capability = self.texts["compute_capability"]
        if capability and not re.fullmatch(r"[0-9]+\.[0-9]", capability):
            self._refuse("compute_capability", 'must be like "9.0"', capability)
        self.sections = {name: self._section(name, document.get(name, MISSING)) for name in SECTIONS}
        self._relations()

    def _relations(self) -> None:
        for low, high in AT_MOST:
            if low in self.citations and high in self.citations:
                given, limit = self.citations[low].value, self.citations[high].value
                if given > limit:
                    self._refuse(low, f"must be at most {high} = {limit}", given)

    def _section(self, name: str, table: object) -> object:
        """The section's dataclass, or None if it is absent or anything in it is wrong."""
        if table is MISSING:
            if name not in OPTIONAL_SECTIONS:
                self._missing(name, "section")
            return None
        if not isinstance(table, dict):
            self._refuse(name, f"must be a section, opened by [{name}]", table)
            return None
        cls = SECTIONS[name]
        self._unknown_names(f"{name}.", table, tuple(entry.name for entry in fields(cls)), "number")
        numbers = {entry.name: self._number(f"{name}.{entry.name}", entry, table) for entry in fields(cls)}
        complete = all(numbers[entry.name] is not None or entry.default is None for entry in fields(cls))
        return cls(**numbers) if complete else None

    def _number(self, where: str, entry: Field[Any], table: Mapping[str, Any]) -> float | None:
        given = table.get(entry.name, MISSING)
        if given is MISSING:
            if entry.default is MISSING:
                self._missing(where, "number")
            return None
        if not isinstance(given, dict):
            shape = '{ value = ..., status = "...", source = "..." }'
            self._refuse(where, f"a bare value without status and source; write {shape}", given)
            return None
        self._unknown_names(f"{where}.", given, ENTRY_KEYS, "key")
        status = self._text(f"{where}.status", given.get("status", MISSING))
        self._one_of(f"{where}.status", status, STATUSES)
        source = self._text(f"{where}.source", given.get("source", MISSING))
        note = self._text(f"{where}.note", given["note"]) if given.get("note", "") != "" else ""
        value = given.get("value", MISSING)
        if value is MISSING:
            self._missing(f"{where}.value", "number")
            return None
        if rule := _broken_rule(value, entry):
            self._refuse(f"{where}.value", rule, value)
            return None
        number = int(value) if entry.type == "int" else float(value)
        self.citations[where] = Citation(number, status, source, note)
        return number

    def _text(self, where: str, given: object) -> str:
        """Empty if it is missing or no text, which is then a problem."""
        if isinstance(given, str) and given.strip():
            return given
        if given is MISSING:
            self._missing(where, "text")
        else:
            self._refuse(where, "must be text in quotes, not blank", given)
        return ""

    def _one_of(self, where: str, given: str, allowed: tuple[str, ...]) -> None:
        if given and given not in allowed:
            self.problems.append(f"{where}: {unknown(where.rpartition('.')[2], given, allowed)}")

    def _unknown_names(self, where: str, table: Mapping[str, Any], allowed: tuple[str, ...], kind: str) -> None:
        self.problems += [f"{where}{name}: {unknown(kind, name, allowed)}" for name in table if name not in allowed]

    def _missing(self, where: str, what: str) -> None:
        """A misspelt name is one mistake: what it was taken for is not reported missing as well."""
        parent, dot, name = where.rpartition(".")
        misspelt = f"did you mean {name!r}?"
        if not any(problem.startswith(parent + dot) and misspelt in problem for problem in self.problems):
            self.problems.append(f"{where}: missing {what}")

    def _refuse(self, where: str, rule: str, given: object) -> None:
        shown = str(given) if isinstance(given, float) else json.dumps(given, default=str, ensure_ascii=False)
        self.problems.append(f"{where}: {rule}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _broken_rule(given: object, entry: Field[Any]) -> str:
    """What `given` must be and is not; empty if it may be the value of that field."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return "must be a number"
    if not abs(given) < LARGEST:
        return f"must be a finite number below {LARGEST:g}"
    if entry.type == "int" and given != int(given):
        return "must be a whole number"
    if choices := entry.metadata.get("choices"):
        return "" if given in choices else f"must be {' or '.join(map(str, choices))}"
    may_be_zero = entry.metadata.get("may_be_zero", False)
    if given < 0 or (given == 0 and not may_be_zero):
        return "must not be negative" if may_be_zero else "must be positive"
    if 0 < given < SMALLEST:
        return f"must be at least {SMALLEST:g}"
    at_most = entry.metadata.get("at_most", LARGEST)
    return "" if given <= at_most else f"must be at most {at_most:g}"
