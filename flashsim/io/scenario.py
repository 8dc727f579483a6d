"""Scenario files: the cases to run and the measurements to print beside them.

    title = "FA3 ablation"
    [case]                                  # what all cases share
    gpu = "h100-sxm5"
    schedule = "fa3"
    batch = 4
    heads = 16
    seqlen = 8448
    head_dim = 128
    set = { build = "2024-07" }             # switches of the schedule
    [grid]                                  # every combination, in the order of the file; the last key moves fastest
    set = [{}, { intra_wg_overlap = false }]
    [[measured]]                            # its keys single out one case; see flashsim.io.beside
    set = {}
    tflops = 661                            # or time_us
    source = "FA3 paper, table 2"

A grid's key overrides the case's; `set` tables are merged, and the grid's value wins. Several `[[grid]]` tables give
their cases one after the other. `tokens` in place of `batch` means batch = tokens / seqlen; `hidden` in place of
`heads` means heads = hidden / head_dim. A relative path starts at the scenario's folder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsim.errors import InputError, unknown
from flashsim.io.beside import Beside, Measured, Published
from flashsim.io.case import Case, CaseBuilder, check_fields
from flashsim.io.fields import list_of_tables, read_toml, shown
from flashsim.io.measured import option_text

MAX_CASES = 10_000
"""More than anybody reads in a table; a grid beyond it is a mistake."""
TABLES = ("title", "case", "grid", "measured", "measured_from", "published")
OTHER_TABLES = ("fp8_error", "claim")
"""A file with one of them is another kind of scenario: see `flashsim.io.experiment`."""


@dataclass(frozen=True)
class ScenarioCase:
    """A case of a scenario. `label` names it by what varies."""

    label: str
    case: Case
    measured: Measured | None = None


@dataclass(frozen=True)
class Grid:
    """One grid: the keys with more than one value, and the number of its cases."""

    varying: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Scenario:
    """A checked scenario. The cases of its grids follow one another."""

    path: str
    title: str
    grids: tuple[Grid, ...]
    cases: tuple[ScenarioCase, ...]
    published: tuple[Published, ...]


@dataclass(frozen=True)
class _Point:
    """One combination of a grid's values, and the name of the table that they stand in."""

    grid: str
    values: dict[str, Any]


def read_scenario(path: str | Path) -> Scenario:
    """Read and check a scenario. Raises InputError with one line per mistake in it."""
    tables = read_toml(path)
    if other := [name for name in OTHER_TABLES if name in tables]:
        raise InputError(f"{path}: {other[0]}: is another kind of scenario, without cases")
    allowed = (*TABLES, *OTHER_TABLES)
    problems = [f"{path}: {unknown('key', name, allowed)}" for name in tables if name not in TABLES]
    title = tables.get("title", "")
    if not isinstance(title, str):
        problems.append(f"{path}: title: {shown(title)} is not text")
    grids, points, bad = _grids(path, tables, problems)
    labels, cases = _build(path, tables, points, bad, problems)
    beside = Beside(path, tables, problems)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    own_sets = [point.values.get("set", {}) for point in points]
    measured, published = beside.join(labels, cases, own_sets, problems)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    joined = tuple(ScenarioCase(*parts) for parts in zip(labels, cases, measured, strict=True))
    return Scenario(str(path), title, grids, joined, published)


def _grids(
    path: str | Path, tables: Mapping[str, Any], problems: list[str]
) -> tuple[tuple[Grid, ...], list[_Point], set[str]]:
    """The grids, all their points in order, and the keys of which a value was refused."""
    given = list_of_tables(path, tables, "grid", problems)
    names = ["grid"] if len(given) == 1 else [f"grid[{number}]" for number in range(1, len(given) + 1)]
    bad: set[str] = set()
    axes = [_axes(path, name, grid, bad, problems) for name, grid in zip(names, given, strict=True)] or [{}]
    count = sum(math.prod(map(len, grid.values())) for grid in axes)
    if count > MAX_CASES:
        problems.append(f"{path}: grid: {count} cases, at most {MAX_CASES} are allowed")
        return (), [], bad
    grids, points = [], []
    for name, grid in zip(names or ["case"], axes, strict=True):
        found = [_Point(name, values) for values in _product(grid)]
        varying = tuple(key for key in grid if any(point.values[key] != found[0].values[key] for point in found))
        grids.append(Grid(varying, len(found)))
        points += found
    return tuple(grids), points, bad


def _axes(
    path: str | Path, name: str, grid: Mapping[str, Any], bad: set[str], problems: list[str]
) -> dict[str, list[Any]]:
    """The checked lists of one grid. Keys of which a value was refused are added to *bad*."""
    axes: dict[str, list[Any]] = {}
    for given, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            problems.append(f"{path}: {name}.{given}: {shown(choices)} is not a list of values")
            bad.add(given)
            continue
        for position, choice in enumerate(choices, start=1):

            def where(key: str, position: int = position) -> str:
                return f"{path}: {name}.{key}[{position}]" if key else f"{path}: {name}"

            value, lines, refused = check_fields({given: choice}, where)
            problems += lines
            bad |= refused
            for key, checked in value.items():
                axes.setdefault(key, []).append(checked)
    return axes


def _product(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The cartesian product, last key fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _build(
    path: str | Path, tables: Mapping[str, Any], points: list[_Point], bad: set[str], problems: list[str]
) -> tuple[list[str], list[Case]]:
    """The case of every point and its label. What is wrong with many cases alike is said once."""
    table = tables.get("case", {})
    if not isinstance(table, dict):
        problems.append(f"{path}: case: {shown(table)} is not a table")
        table = {}
    shared, lines, refused = check_fields(table, lambda key: f"{path}: case.{key}".rstrip("."))
    problems += lines
    bad = bad | refused
    builder = CaseBuilder(Path(path).parent)
    labels, cases = [], []
    alike: dict[str, list[str]] = {}
    for point in points:
        label = _label(point, points)

        def where(key: str, point: _Point = point) -> str:
            return f"{path}: {point.grid if key in point.values else 'case'}.{key}" if key else _WHOLE_CASE

        values = shared | point.values | {"set": shared.get("set", {}) | point.values.get("set", {})}
        case, lines = builder.build(values, where, bad)
        for line in lines:
            if line.startswith(_WHOLE_CASE):
                alike.setdefault(line.removeprefix(f"{_WHOLE_CASE}: "), []).append(label)
            else:
                problems.append(line)
        if case is not None:
            labels.append(label)
            cases.append(case)
    for line, found in alike.items():
        more = f" (and {len(found) - 1} more cases)" if len(found) > 1 else ""
        problems.append(f"{path}: {found[0]}{more}: {line}")
    return labels, cases


_WHOLE_CASE = "\0case"


def _label(point: _Point, points: list[_Point]) -> str:
    """What tells the case of *point* from the others."""
    parts = []
    for key, value in point.values.items():
        if any(other.values.get(key) != value for other in points):
            parts.append(f"{key} {(option_text(value) or '{}') if isinstance(value, dict) else value}")
    return ", ".join(parts) or "case"
