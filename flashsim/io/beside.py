"""What a scenario puts beside its predictions: measurements of single cases, and published fractions of peak.

    [[measured]]                            # its keys, any of a case's, single out one case
    seqlen = 8448
    tflops = 661                            # or time_us, or both
    source = "FA3 paper, table 2"

    [measured_from]                         # measured rows whose keys are all those of a case
    file = "measured/calibration.csv"
    session = "fa3-paper-h100"              # may be left out

    [[published]]                           # beside the highest prediction among the cases that its keys match
    schedule = "fa3"
    datasheet_fraction = 0.75
    source = "FA3 paper, abstract"

In `[[measured]]` and `[[published]]`, `set` matches a case whose grid sets exactly that, or whose switches are exactly
that. A row with a known clock is a measurement of a case only if the case has that `clock_mhz`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flashsim.errors import InputError, unknown
from flashsim.io.case import PROBLEM_FIELDS, Case, check_fields
from flashsim.io.fields import Fraction, Name, Positive, complaints, list_of_tables
from flashsim.io.measured import MeasuredRow, disagreement, option_text, read_measured


@dataclass(frozen=True)
class Measured:
    """A measurement of one case; each of time and TFLOP/s follows from the other if only one was given."""

    time_us: float
    tflops: float
    source: str
    id: str | None = None


@dataclass(frozen=True)
class Published:
    """A published fraction of the datasheet's peak, and the indices of the cases that it is about."""

    cases: tuple[int, ...]
    datasheet_fraction: float
    source: str


class _MeasuredValue(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tflops: Positive | None = None
    time_us: Positive | None = None
    source: Name


class _PublishedValue(BaseModel):
    model_config = ConfigDict(extra="forbid")
    datasheet_fraction: Fraction
    source: Name


class _MeasuredFrom(BaseModel):
    model_config = ConfigDict(extra="forbid")
    file: Name
    session: Name | None = None


@dataclass(frozen=True)
class _Entry:
    """A `[[measured]]` or `[[published]]` table: its name, which cases it is about, what it says."""

    name: str
    keys: dict[str, Any]
    value: Any


class Beside:
    """The checked tables; mistakes in them are added to *problems*, one line each."""

    def __init__(self, path: str | Path, tables: Mapping[str, Any], problems: list[str]) -> None:
        self._path = path
        self._measured = self._entries(tables, "measured", _MeasuredValue, problems)
        self._published = self._entries(tables, "published", _PublishedValue, problems)
        self._asks_for_rows = "measured_from" in tables
        self._rows = self._read_rows(tables, problems)

    def join(
        self, labels: Sequence[str], cases: Sequence[Case], own_sets: Sequence[dict[str, Any]], problems: list[str]
    ) -> tuple[list[Measured | None], tuple[Published, ...]]:
        """The measurement of each case, and what was published. *own_sets*: what the grid sets for each case."""
        measured = [self._row_of(case, label, problems) for case, label in zip(cases, labels, strict=True)]
        if self._asks_for_rows and not any(measured) and not problems:
            problems.append(f"{self._path}: measured_from: no row of the file has all keys of a case")
        for entry in self._measured:
            found = _matching(entry, cases, own_sets)
            some = "; ".join(labels[index] for index in found[:3]) + ("; ..." if len(found) > 3 else "")
            if len(found) != 1:
                problems.append(
                    f"{self._path}: {entry.name}: its keys match {len(found)} cases, not exactly one"
                    + (f" ({some})" if found else "")
                )
            elif measured[found[0]] is not None:
                problems.append(f"{self._path}: {entry.name}: {some} has a measurement already")
            else:
                measured[found[0]] = self._own(entry, cases[found[0]], problems)
        published = []
        for entry in self._published:
            if found := _matching(entry, cases, own_sets):
                published.append(Published(tuple(found), entry.value.datasheet_fraction, entry.value.source))
            else:
                problems.append(f"{self._path}: {entry.name}: its keys match no case")
        return measured, tuple(published)

    def _entries(
        self, tables: Mapping[str, Any], name: str, model: type[BaseModel], problems: list[str]
    ) -> list[_Entry]:
        entries = []
        for number, table in enumerate(list_of_tables(self._path, tables, name, problems), start=1):

            def where(key: str, number: int = number) -> str:
                return f"{self._path}: {name}[{number}].{key}".rstrip(".")

            said = {key: value for key, value in table.items() if key in model.model_fields}
            about = {key: value for key, value in table.items() if key not in said}
            keys, lines, _ = check_fields(about, where, beside=model.model_fields)
            problems += lines
            try:
                entries.append(_Entry(f"{name}[{number}]", keys, model.model_validate(said)))
            except ValidationError as error:
                problems += complaints(error, where, model.model_fields)
        return entries

    def _read_rows(self, tables: Mapping[str, Any], problems: list[str]) -> list[MeasuredRow]:
        rows: list[MeasuredRow] = []
        for table in list_of_tables(self._path, tables, "measured_from", problems):

            def where(key: str) -> str:
                return f"{self._path}: measured_from.{key}".rstrip(".")

            try:
                wanted = _MeasuredFrom.model_validate(table)
                found = read_measured(Path(self._path).parent / wanted.file)
            except ValidationError as error:
                problems += complaints(error, where, _MeasuredFrom.model_fields)
                continue
            except InputError as error:
                problems += [f"{where('file')}: {line}" for line in error.problems]
                continue
            sessions = sorted({row.session for row in found})
            if wanted.session is not None and wanted.session not in sessions:
                problems.append(f"{where('session')}: {unknown('session', wanted.session, sessions)}")
            rows += [row for row in found if wanted.session in (None, row.session)]
        return rows

    def _row_of(self, case: Case, label: str, problems: list[str]) -> Measured | None:
        found = [row for row in self._rows if _is_of(row, case)]
        if len(found) > 1:
            ids = ", ".join(row.id for row in found)
            problems.append(f"{self._path}: measured_from: rows {ids} are all of one case ({label}); name a session")
        if len(found) != 1:
            return None
        row = found[0]
        tflops = row.tflops if row.flop_convention == "std" else None
        return _completed(case, row.time_us, tflops, row.source, row.id)

    def _own(self, entry: _Entry, case: Case, problems: list[str]) -> Measured | None:
        value: _MeasuredValue = entry.value
        if value.time_us is None and value.tflops is None:
            problems.append(f"{self._path}: {entry.name}: tflops or time_us is required")
            return None
        if wrong := disagreement(case.problem.flops, value.time_us, value.tflops):
            problems.append(f"{self._path}: {entry.name}: {wrong}")
        return _completed(case, value.time_us, value.tflops, value.source)


def _completed(case: Case, time_us: float | None, tflops: float | None, source: str, id: str | None = None) -> Measured:
    flops = case.problem.flops
    if time_us is None:
        assert tflops is not None, "a measurement has a time or a rate"
        return Measured(flops / tflops / 1e6, tflops, source, id)
    return Measured(time_us, flops / time_us / 1e6 if tflops is None else tflops, source, id)


def _is_of(row: MeasuredRow, case: Case) -> bool:
    """Whether the row has the case's keys, all of them."""
    return (
        row.device == case.gpu.name
        and row.schedule == case.schedule.name()
        and option_text(row.options) == option_text(case.options)
        and row.clock_mhz in (None, case.clock_mhz)
        and all(getattr(row, field) == getattr(case.problem, field) for field in PROBLEM_FIELDS)
    )


def _matching(entry: _Entry, cases: Sequence[Case], own_sets: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the cases that have the entry's keys."""

    def has(index: int, key: str, value: Any) -> bool:
        if key != "set":
            return bool(cases[index].keys.get(key) == value)
        return option_text(value) in (option_text(own_sets[index]), option_text(cases[index].options))

    return [index for index in range(len(cases)) if all(has(index, key, value) for key, value in entry.keys.items())]
