"""Measured rows, in one CSV schema for published numbers, own GPU runs and a user's; and what is known of a session.

Columns: `COLUMNS`. Blank means unknown for clock_mhz, 0 for dropout, heads_q and head_dim for heads_kv and head_dim_v,
no switch for options, nothing for notes; one of time_us and tflops may be blank. options is `key=value;key=value`.
flop_convention `std` counts FLOPs as `AttentionProblem.flops` does; with any other only time_us is used.
time_us is time on the GPU: all kernels of the call and the gaps between them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from flashsim.errors import InputError, unknown
from flashsim.io.fields import Clock, Name, Number, Positive, Size, complaints, read_text, read_toml, shown
from flashsim.problem import AttentionProblem

ROUNDING = 0.06
"""Published times and TFLOP/s are rounded, and short lengths are sometimes padded; beyond this they contradict."""
VALUE_KINDS = ("table", "plot", "text", "measured")


def option_text(options: Mapping[str, Any]) -> str:
    """Switches as the schema writes them, sorted by name: `build=2024-07;pingpong=false`."""
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in options.items()}
    return ";".join(f"{key}={values[key]}" for key in sorted(values))


def _options(value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(key): str(choice) for key, choice in value.items()}
    options: dict[str, str] = {}
    for part in filter(None, map(str.strip, str(value).split(";"))):
        key, equals, choice = (piece.strip() for piece in part.partition("="))
        if not (key and equals and choice):
            raise ValueError(f"{shown(part)} is not key=value")
        if key in options:
            raise ValueError(f"{key!r} is set twice")
        options[key] = choice
    return options


def _value_kind(value: object) -> str:
    if value not in VALUE_KINDS:
        raise ValueError(unknown("value kind", value, VALUE_KINDS))
    return str(value)


class MeasuredRow(BaseModel):
    """One measured time. Field by field the schema's columns, with blanks replaced by what they mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    session: Name
    source: Name
    device: Name
    clock_mhz: Clock | None = None
    schedule: Name
    options: Annotated[dict[str, str], BeforeValidator(_options)]
    direction: Name
    dtype: Name
    batch: Size
    heads_q: Size
    heads_kv: Size
    seqlen_q: Size
    seqlen_k: Size
    head_dim: Size
    head_dim_v: Size
    mask: Name
    dropout: Number
    time_us: Positive | None = None
    tflops: Positive | None = None
    flop_convention: Name
    value_kind: Annotated[str, BeforeValidator(_value_kind)]
    notes: str = ""


COLUMNS = tuple(MeasuredRow.model_fields)


def std_flops(row: MeasuredRow) -> int | None:
    """FLOPs of the row's call by the std convention; None if its mask or direction is none that is known here."""
    try:
        return AttentionProblem(
            batch=row.batch,
            heads_q=row.heads_q,
            heads_kv=row.heads_kv,
            seqlen_q=row.seqlen_q,
            seqlen_k=row.seqlen_k,
            head_dim=row.head_dim,
            head_dim_v=row.head_dim_v,
            mask=row.mask,
            direction=row.direction,
        ).flops
    except InputError:
        return None


def disagreement(flops: int, time_us: float | None, tflops: float | None, slack: float = 0.0) -> str | None:
    """One line if *time_us* and *tflops* contradict each other by more than rounding (and *slack*, a fraction)."""
    if time_us is None or tflops is None:
        return None
    meant = flops / time_us / 1e6
    if abs(tflops / meant - 1) <= ROUNDING + slack:
        return None
    return f"{time_us:g} us and {tflops:g} TFLOP/s disagree: {flops} FLOPs in that time are {meant:.4g} TFLOP/s"


def read_measured(path: str | Path) -> list[MeasuredRow]:
    """All rows of a CSV file. Raises InputError with one line per mistake, by line number and id."""
    text = read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="", skipinitialspace=True)
    rows: list[MeasuredRow] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        if problems := _header_problems(path, header):
            raise InputError(problems)
        for cells in reader:
            name = (cells["id"] or "").strip()
            place = f"{path}:{reader.line_num}" + (f" ({name})" if name else "")
            row, lines = _row(cells, len(header))
            if name in seen:
                lines.append(f"id: stands in line {seen[name]} too")
            elif name:
                seen[name] = reader.line_num
            problems += [f"{place}: {line}" for line in lines]
            if row is not None:
                rows.append(row)
    except csv.Error as error:
        problems.append(f"{path}:{reader.line_num}: not valid CSV: {error}")
    if not rows and not problems:
        problems.append(f"{path}: has no rows")
    if problems:
        raise InputError(problems)
    return rows


def _header_problems(path: str | Path, header: list[str]) -> list[str]:
    """A missing column is named with the one that may be it; further columns of the user's are let be."""
    others = [name for name in header if name and name not in COLUMNS]
    return [
        f"{path}:1: column {name!r} is missing"
        + (f" (columns that are not of the schema: {', '.join(others)})" * bool(others))
        for name in COLUMNS
        if name not in header
    ] + [f"{path}:1: column {name!r} stands twice" for name in dict.fromkeys(header) if header.count(name) > 1]


def _row(cells: dict[str, Any], width: int) -> tuple[MeasuredRow | None, list[str]]:
    if "" in cells or None in cells.values():
        found = sum(value is not None for name, value in cells.items() if name) + len(cells.get("", ()))
        return None, [f"has {found} values, the header has {width}"]
    given: dict[str, Any] = {name: cells[name].strip() for name in COLUMNS}
    given = {name: value for name, value in given.items() if value or name not in ("clock_mhz", "time_us", "tflops")}
    given["dropout"] = given["dropout"] or "0"
    given["heads_kv"] = given["heads_kv"] or given["heads_q"]
    given["head_dim_v"] = given["head_dim_v"] or given["head_dim"]
    try:
        row = MeasuredRow.model_validate(given, context={"text": True})
    except ValidationError as error:
        return None, complaints(error, lambda key: key, COLUMNS, "column")
    problems = []
    if row.heads_q % row.heads_kv:
        problems.append(f"heads_kv: {row.heads_kv} does not divide heads_q = {row.heads_q}")
    if not 0 <= row.dropout < 1:
        problems.append(f"dropout: {row.dropout:g} is not in [0, 1)")
    if row.time_us is None and row.tflops is None:
        problems.append("time_us and tflops: both are blank")
    elif row.time_us is None and row.flop_convention != "std":
        problems.append(f"time_us: is blank, and tflops of the convention {row.flop_convention!r} cannot be used")
    elif row.flop_convention == "std" and (flops := std_flops(row)) is not None:
        slack = _half_unit(given.get("time_us", "")) + _half_unit(given.get("tflops", ""))
        if wrong := disagreement(flops, row.time_us, row.tflops, slack):
            problems.append(wrong)
    return (None if problems else row), problems


def _half_unit(text: str) -> float:
    """Half a unit of the last digit of *text*, as a fraction of its value: what rounding alone may have changed."""
    try:
        number = Decimal(text)
        exponent = number.as_tuple().exponent
        return float(Decimal(5).scaleb(int(exponent) - 1) / abs(number))
    except (InvalidOperation, ValueError, ZeroDivisionError):
        return 0.0


class _Session(BaseModel):
    """What flashsim uses of a session; the file may say more."""

    clock_mhz: Clock | None = None


def read_sessions(path: str | Path) -> dict[str, dict[str, Any]]:
    """What is known of each session, by name; empty if there is no such file. Raises InputError with every mistake."""
    if not Path(path).exists():
        return {}
    sessions = read_toml(path)
    problems = []
    for name, known in sessions.items():

        def where(key: str, name: str = name) -> str:
            return f"{path}: {name}.{key}".rstrip(".")

        try:
            _Session.model_validate(known)
        except ValidationError as error:
            problems += complaints(error, where, ())
    if problems:
        raise InputError(problems)
    return sessions
