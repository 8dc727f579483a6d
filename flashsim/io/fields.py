"""Types of the fields in every file that a user writes, and how their errors read.

A number in a file is a number; an option of the command line is text. Both go through the validators below, which
accept text only when the pydantic context says `{"text": True}`. So `1e3` is a bad batch wherever it stands, and a
quoted `"4"` in a TOML file is text by mistake and is called so.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, ValidationInfo

from flashsim.errors import InputError, unknown

SIZE_LIMIT = 2**31 - 1
"""Kernels index tensors with 32-bit sizes."""
CLOCK_RANGE_MHZ = (100.0, 10_000.0)
"""Every GPU's clock lies in it; a clock given in GHz or in Hz does not."""

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf)", re.IGNORECASE)


def shown(value: object) -> str:
    """What the user gave, in at most 60 characters and one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def whole_number(value: object, *, text: bool) -> int:
    """An int. Raises ValueError for anything else; text counts only if `text`."""
    if text and isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        digits = value.strip()
        # Python refuses to convert thousands of digits; such a number is over every limit anyway.
        value = int(digits) if len(digits) < 30 else int(digits[:30])
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{shown(value)} is not a whole number")
    return value


def finite_number(value: object, *, text: bool) -> float:
    """A finite float. Raises ValueError for anything else; text counts only if `text`."""
    if text and isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shown(value)} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)


def _text(info: ValidationInfo) -> bool:
    return bool(info.context and info.context.get("text"))


def _size(value: object, info: ValidationInfo) -> int:
    number = whole_number(value, text=_text(info))
    if not 1 <= number <= SIZE_LIMIT:
        raise ValueError(f"{shown(number)} is not between 1 and {SIZE_LIMIT}")
    return number


def Whole(low: int, high: int) -> BeforeValidator:  # noqa: N802 - stands where a type does
    """Marks an int as a whole number from *low* to *high*."""

    def check(value: object, info: ValidationInfo) -> int:
        number = whole_number(value, text=_text(info))
        if not low <= number <= high:
            raise ValueError(f"{shown(number)} is not between {low} and {high}")
        return number

    return BeforeValidator(check)


def one_of(kind: str, allowed: Iterable[str]) -> Callable[[object], str]:
    """A validator for one of the names *allowed*, which *kind* is the word for."""
    names = tuple(allowed)

    def check(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is not text (allowed: {', '.join(names)})")
        if value not in names:
            raise ValueError(unknown(kind, value, names))
        return value

    return check


def _positive(value: object, info: ValidationInfo) -> float:
    number = finite_number(value, text=_text(info))
    if number <= 0:
        raise ValueError(f"{number:g} is not above 0")
    return number


def _clock(value: object, info: ValidationInfo) -> float:
    number = finite_number(value, text=_text(info))
    low, high = CLOCK_RANGE_MHZ
    if not low <= number <= high:
        raise ValueError(f"{number:g} is not between {low:g} and {high:g} MHz")
    return number


def _number(value: object, info: ValidationInfo) -> float:
    return finite_number(value, text=_text(info))


def _fraction(value: object, info: ValidationInfo) -> float:
    number = finite_number(value, text=_text(info))
    if not 0 < number <= 1:
        raise ValueError(f"{number:g} is not a fraction above 0 and up to 1")
    return number


def _whole_or_refused(value: object, info: ValidationInfo) -> object:
    """A whole number given as text becomes one; everything else passes, for `AttentionProblem` to refuse."""
    try:
        return whole_number(value, text=_text(info))
    except ValueError:
        return value


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not text")
    if not value.strip():
        raise ValueError("is blank")
    return value.strip()


def _switch(value: object) -> str | int | float | bool:
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"{shown(value)} is not text, a number, true or false")
    return value


Size = Annotated[int, BeforeValidator(_size)]
Positive = Annotated[float, BeforeValidator(_positive)]
Clock = Annotated[float, BeforeValidator(_clock)]
Fraction = Annotated[float, BeforeValidator(_fraction)]
Number = Annotated[float, BeforeValidator(_number)]
WholeOrRefused = Annotated[Any, BeforeValidator(_whole_or_refused)]
Name = Annotated[str, BeforeValidator(_name)]
SwitchValue = Annotated[str | int | float | bool, BeforeValidator(_switch)]


def complaints(
    error: ValidationError, where: Callable[[str], str], allowed: Iterable[str], kind: str = "key"
) -> list[str]:
    """One line per mistake in *error*; *where* turns a path such as `set.build` into the name the user knows."""
    lines = []
    for mistake in error.errors(include_url=False, include_context=False):
        path = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            parent, _, name = path.rpartition(".")
            lines.append(": ".join(filter(None, (where(parent), unknown(kind, name, allowed)))))
        elif mistake["type"] == "missing":
            lines.append(f"{where(path)}: is required")
        elif mistake["type"] == "value_error":
            lines.append(f"{where(path)}: {mistake['msg'].removeprefix('Value error, ')}")
        else:
            reason = mistake["msg"].removeprefix("Input should be ")
            lines.append(f"{where(path)}: {shown(mistake['input'])} should be {reason}")
    return lines


def read_text(path: str | Path) -> str:
    """Content of a UTF-8 file. Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Tables of a TOML file. Raises InputError if it cannot be read or is no TOML."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def list_of_tables(path: str | Path, tables: Mapping[str, Any], name: str, problems: list[str]) -> list[dict[str, Any]]:
    """The tables of `[name]` or `[[name]]`; empty, and a line in *problems*, if it is something else."""
    found = tables.get(name, [])
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        problems.append(f"{path}: {name}: {shown(found)} is not a table")
        return []
    return found
