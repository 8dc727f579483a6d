"""One case: which problem, schedule, GPU and switches. A scenario's tables and the options of `simulate` end here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from flashsim.devices import load_device
from flashsim.errors import InputError
from flashsim.io.fields import Clock, Name, Number, Size, SwitchValue, WholeOrRefused, complaints, shown
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule

if TYPE_CHECKING:
    from flashsim.devices import DeviceSpec
    from flashsim.schedules.base import Schedule

T = TypeVar("T")
Where = Callable[[str], str]
"""Turns a key into the name that the user knows it by, and "" into the name of the whole table."""

ALIASES = {"heads_q": "heads", "heads_kv": "kv_heads", "seqlen_q": "seqlen", "device": "gpu"}
"""The measured-row schema's names for keys of a case."""
REQUIRED = ("gpu", "schedule", "batch", "heads", "seqlen", "head_dim")
PROBLEM_FIELDS = {
    "batch": "batch",
    "heads_q": "heads",
    "heads_kv": "kv_heads",
    "seqlen_q": "seqlen",
    "seqlen_k": "seqlen_k",
    "head_dim": "head_dim",
    "head_dim_v": "head_dim_v",
    "mask": "mask",
    "dtype": "dtype",
    "direction": "direction",
    "dropout": "dropout",
}
"""Field of `AttentionProblem`: key of a case."""
_PATH = re.compile(r"[/\\]|\.toml$|\.py(:|$)")
# Stands in for a value that is missing or was refused, so that the others are still checked.
_STAND_IN = {"batch": 1, "heads_q": 1, "seqlen_q": 1, "head_dim": 64}


class CaseTable(BaseModel):
    """Keys of `[case]`, each of which may also stand in `[grid]` with a list of values.

    What `AttentionProblem` and the schedule check themselves is not checked here a second time.
    """

    model_config = ConfigDict(extra="forbid")

    gpu: Name | None = None
    schedule: Name | None = None
    batch: WholeOrRefused = None
    tokens: Size | None = None
    heads: WholeOrRefused = None
    hidden: Size | None = None
    kv_heads: WholeOrRefused = None
    seqlen: WholeOrRefused = None
    seqlen_k: WholeOrRefused = None
    head_dim: WholeOrRefused = None
    head_dim_v: WholeOrRefused = None
    mask: Name | None = None
    dtype: Name | None = None
    direction: Name | None = None
    dropout: Number | None = None
    clock_mhz: Clock | None = None
    set: dict[str, SwitchValue] | None = None


CASE_KEYS = tuple(CaseTable.model_fields)


@dataclass(frozen=True)
class Case:
    """A checked case. `keys` holds every key with its final value, for matching and printing."""

    problem: AttentionProblem
    gpu: DeviceSpec
    schedule: type[Schedule]
    options: dict[str, Any]
    clock_mhz: float | None
    keys: dict[str, Any]


def check_fields(
    table: Mapping[str, Any], where: Where, *, text: bool = False, beside: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str], set[str]]:
    """Values of *table* that are right in themselves, one line per mistake, and the keys whose values are wrong.

    *text*: numbers are given as text, as on the command line. *beside*: keys that the same table may have, which the
    caller has taken out.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    for name, value in table.items():
        key = ALIASES.get(name, name)
        if key in given:
            problems.append(f"{where(name)}: means the same as {key}, which is given too")
        given[key] = value
    bad: set[str] = set()
    try:
        model = CaseTable.model_validate(given, context={"text": text})
    except ValidationError as error:
        lines = complaints(error, where, (*CASE_KEYS, *beside))
        problems += lines
        # A misspelt key is not missing as well.
        meant = {name for line in lines for name in re.findall(r"did you mean '(\w+)'", line)}
        bad = {str(mistake["loc"][0]) for mistake in error.errors()} | meant - set(given)
        good = {key: value for key, value in given.items() if key not in bad}
        model = CaseTable.model_validate(good, context={"text": text})
    return model.model_dump(exclude_none=True), problems, bad & set(CASE_KEYS)


def read_switches(texts: Iterable[str], option: str) -> tuple[dict[str, str], list[str]]:
    """`KEY=VALUE` texts as a table of switches, and one line per mistake."""
    values: dict[str, str] = {}
    problems = []
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            problems.append(f"{option}: {shown(text)} is not KEY=VALUE")
        elif key in values:
            problems.append(f"{option}: {shown(key)} is set twice")
        else:
            values[key] = value
    return values, problems


class CaseBuilder:
    """Makes cases of checked values; loads each GPU and schedule once. Relative paths of files start at *folder*."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._gpus: dict[str, DeviceSpec | InputError] = {}
        self._schedules: dict[str, type[Schedule] | InputError] = {}

    def build(self, values: Mapping[str, Any], where: Where, bad: Iterable[str] = ()) -> tuple[Case | None, list[str]]:
        """The case, or None and one line per mistake that the values make together.

        Keys in *bad* were refused already: they are not complained of again, and the rest is checked without them.
        """
        keys = dict(values)
        refused = set(bad)
        problems = _derive(keys, refused, where)
        missing = {key for key in REQUIRED if key not in keys} - refused
        problems += [f"{where(key)}: is required" for key in REQUIRED if key in missing]
        gpu = self._load(load_device, self._gpus, keys.get("gpu"), where("gpu"), problems)
        schedule = self._load(load_schedule, self._schedules, keys.get("schedule"), where("schedule"), problems)
        problem, complete = _problem(keys, refused | missing, where, problems)
        options = dict(keys.get("set", {}))
        if schedule is not None:
            architecture = schedule.architectures[0] if gpu is None else gpu.architecture
            try:
                schedule.configure(problem, architecture, options)
            except InputError as error:
                problems += [_placed(where(""), line) for line in error.problems]
        if problems or refused or not complete or gpu is None or schedule is None:
            return None, problems
        keys |= {key: getattr(problem, field) for field, key in PROBLEM_FIELDS.items()}
        keys["set"] = options
        return Case(problem, gpu, schedule, options, keys.get("clock_mhz"), keys), []

    def _load(
        self,
        load: Callable[[str], T],
        known: dict[str, T | InputError],
        name: str | None,
        place: str,
        problems: list[str],
    ) -> T | None:
        if name is None:
            return None
        if name not in known:
            path = name
            if self._folder is not None and _PATH.search(name) and not Path(name).is_absolute():
                path = str(self._folder / name)
            try:
                known[name] = load(path)
            except InputError as error:
                known[name] = error
        found = known[name]
        if isinstance(found, InputError):
            problems += [f"{place}: {line}" for line in found.problems]
            return None
        return found


def _placed(place: str, line: str) -> str:
    return f"{place}: {line}" if place else line


def _derive(keys: dict[str, Any], refused: set[str], where: Where) -> list[str]:
    """Put batch = tokens / seqlen and heads = hidden / head_dim into *keys*; return one line per mistake."""
    problems = []
    for product, factor, quotient in (("tokens", "seqlen", "batch"), ("hidden", "head_dim", "heads")):
        divisor = keys.get(factor)
        if product in refused:
            refused.add(quotient)
        elif product in keys and quotient in keys:
            problems.append(f"{where(product)}: {quotient} is given too, and {product} = {quotient} * {factor}")
        elif product in keys and not (isinstance(divisor, int) and divisor > 0):
            refused.add(quotient)
        elif product in keys and keys[product] % divisor:
            problems.append(f"{where(product)}: {keys[product]} is not a multiple of {factor} = {divisor}")
            refused.add(quotient)
        elif product in keys:
            keys[quotient] = keys[product] // divisor
    return problems


def _problem(
    keys: Mapping[str, Any], absent: set[str], where: Where, problems: list[str]
) -> tuple[AttentionProblem, bool]:
    """The problem, and True if it is the one that the user gave, nothing replaced; complaints go to *problems*."""
    given = {field: keys[key] for field, key in PROBLEM_FIELDS.items() if key in keys and key not in absent}
    if "heads_q" not in given:
        given.pop("heads_kv", None)
    whole = {**_STAND_IN, **given}
    try:
        return AttentionProblem(**whole), whole == given
    except InputError as error:
        refused = set()
        for line in error.problems:
            field, _, reason = line.partition(": ")
            refused.add(field)
            known = field in PROBLEM_FIELDS
            problems.append(_placed(where(PROBLEM_FIELDS[field]), reason) if known else _placed(where(""), line))
    kept = {field: value for field, value in given.items() if field not in refused}
    if refused & {"heads_q", "heads_kv"}:
        kept.pop("heads_kv", None)
    return AttentionProblem(**{**_STAND_IN, **kept}), False
