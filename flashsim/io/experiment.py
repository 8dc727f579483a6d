"""Scenario files of the FP8 error experiment, and the published errors to print beside it.

title = "FP8 errors"
[fp8_error]                             # takes the place of [case]; what is left out is as here
seqlen = 8192                           # queries and keys
head_dim = 128
heads = 4
seeds = 5                               # 0 to 4
rows = 512                              # queries of which the error is taken; all, if there are fewer
BLOCK_M = 128                           # rows of Q with one scale
BLOCK_N = 224                           # rows of K and V with one scale, and in one step of the softmax
variants = ["fp16-fa3", "fp8-fa3"]      # all of them if left out
[[published]]
variant = "fp8-fa3"
rmse = 9.1e-3
source = "FA3 paper, table 3"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from flashsim.errors import InputError, unknown
from flashsim.io.fields import Name, Positive, Whole, complaints, list_of_tables, one_of, read_toml, shown

TABLE = "fp8_error"
VARIANTS = (
    "fp16-standard",
    "fp16-fa3",
    "fp8-per-tensor",
    "fp8-fa3",
    "fp8-fa3-no-block-quantization",
    "fp8-fa3-no-incoherent-processing",
)
"""In the order of the paper's table; `flashsim.analysis.fp8_error` says what each computes."""
MAX_NUMBERS = 2**25
"""Of one tensor: 256 MiB in float64, of which the experiment holds about ten at a time."""

Variant = Annotated[str, BeforeValidator(one_of("variant", VARIANTS))]


class Experiment(BaseModel):
    """What to compute: sizes of Q, K and V, how many seeds and query rows, tiles, variants."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seqlen: Annotated[int, Whole(1, 2**20)] = 8192
    head_dim: Annotated[int, Whole(1, 256)] = 128
    heads: Annotated[int, Whole(1, 256)] = 4
    seeds: Annotated[int, Whole(1, 1000)] = 5
    rows: Annotated[int, Whole(1, 2**20)] = 512
    BLOCK_M: Annotated[int, Whole(1, 2**20)] = 128
    BLOCK_N: Annotated[int, Whole(1, 2**20)] = 224
    variants: list[Variant] = list(VARIANTS)


class PublishedError(BaseModel):
    """A published RMSE of one variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    variant: Variant
    rmse: Positive
    source: Name


@dataclass(frozen=True)
class ErrorScenario:
    """A checked scenario. `published` has at most one entry for a variant, and none for one that is not computed."""

    path: str
    title: str
    experiment: Experiment
    published: Mapping[str, PublishedError]


def is_experiment(path: str | Path) -> bool:
    """Whether the file has the table of an experiment. Raises InputError if it cannot be read."""
    return TABLE in read_toml(path)


def check_experiment(values: Mapping[str, Any], where: Callable[[str], str]) -> tuple[Experiment | None, list[str]]:
    """The experiment with these values, or None, and a line for each mistake. *where* names a key to the user."""

    def place(path: str) -> str:
        key, _, index = path.partition(".")
        return where(f"{key}[{int(index) + 1}]" if index else key)

    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        return None, complaints(error, place, Experiment.model_fields)
    problems = []
    if (numbers := experiment.seqlen * experiment.heads * experiment.head_dim) > MAX_NUMBERS:
        problems.append(f"{where('')}: seqlen * heads * head_dim is {numbers}, at most {MAX_NUMBERS} are allowed")
    if not experiment.variants:
        problems.append(f"{where('variants')}: is empty (allowed: {', '.join(VARIANTS)})")
    for position, variant in enumerate(experiment.variants):
        if variant in experiment.variants[:position]:
            problems.append(f"{where(f'variants[{position + 1}]')}: {variant!r} is there already")
    return None if problems else experiment, problems


def read_experiment(path: str | Path) -> ErrorScenario:
    """Read and check the scenario of an experiment. Raises InputError with one line per mistake in it."""
    tables = read_toml(path)
    allowed = ("title", TABLE, "published")
    problems = [f"{path}: {_out_of_place(name, allowed)}" for name in tables if name not in allowed]
    title = tables.get("title", "")
    if not isinstance(title, str):
        problems.append(f"{path}: title: {shown(title)} is not text")
    table = tables.get(TABLE, {})
    experiment = None
    if isinstance(table, dict):
        experiment, lines = check_experiment(table, lambda key: f"{path}: {TABLE}.{key}".rstrip("."))
        problems += lines
    else:
        problems.append(f"{path}: {TABLE}: {shown(table)} is not a table")
    published = _published(path, tables, experiment, problems)
    if problems or experiment is None:
        raise InputError(problems)
    return ErrorScenario(str(path), title, experiment, published)


def _out_of_place(name: str, allowed: tuple[str, ...]) -> str:
    from flashsim.io.scenario import TABLES

    return f"{name}: does not go with {TABLE}" if name in TABLES else unknown("key", name, allowed)


def _published(
    path: str | Path, tables: Mapping[str, Any], experiment: Experiment | None, problems: list[str]
) -> dict[str, PublishedError]:
    published: dict[str, PublishedError] = {}
    for number, table in enumerate(list_of_tables(path, tables, "published", problems), start=1):

        def where(key: str, number: int = number) -> str:
            return f"{path}: published[{number}].{key}".rstrip(".")

        try:
            entry = PublishedError.model_validate(table)
        except ValidationError as error:
            problems += complaints(error, where, PublishedError.model_fields)
            continue
        if entry.variant in published:
            problems.append(f"{where('variant')}: {entry.variant!r} has a published value already")
        elif experiment is not None and entry.variant not in experiment.variants:
            problems.append(f"{where('variant')}: {entry.variant!r} is not in {TABLE}.variants")
        published[entry.variant] = entry
    return published
