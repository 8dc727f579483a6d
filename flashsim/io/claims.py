"""Files of claims: what papers and teaching texts say, and of which case, to hold the simulation against.

    title = "Claims"
    [[claim]]
    claim = "1.5 to 2.0 times faster than FlashAttention-2 in the forward pass"
    source = "FA3 paper, arXiv 2407.08608, abstract"
    says = [1.5, 2.0]                       # a range, or one number
    quantity = "time_ratio"                 # one of QUANTITIES
    why = "where the two differ: the reason"
    [claim.case]                            # as in a scenario; tokens and hidden may take the place of batch and heads
    gpu = "h100-sxm5"
    schedule = "fa3"
    tokens = 16384
    heads = 16
    head_dim = 128
    [claim.than]                            # of a ratio: the keys in which the second case differs
    schedule = "fa2"                        # without the first one's switches, if it is another schedule
    [claim.over]                            # several cases: every combination of these values, in both cases
    seqlen = [512, 16384]

Of several cases the claim is about the range of the values, or, with `up_to = true`, about the highest. `l2 = "none"`
counts HBM traffic without an L2. `[claim.case]` of `flop_per_exp` and `flop_per_fp32_flop` needs `gpu` alone, that of
`exp_time_fraction` `gpu` and head dims; that of `error_ratio` has the keys of `[fp8_error]`, and may be left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError

from flashsim.errors import InputError, unknown
from flashsim.io.case import CASE_KEYS, Case, CaseBuilder, check_fields
from flashsim.io.experiment import Experiment, check_experiment
from flashsim.io.fields import Name, complaints, list_of_tables, one_of, read_toml, shown
from flashsim.io.measured import option_text

TABLE = "claim"
MAX_CASES = 100
"""Of one claim: beyond it `over` is a mistake."""
ERROR_VARIANTS = ["fp8-per-tensor", "fp8-fa3"]


class Quantity(NamedTuple):
    """What a claim can be about; `flashsim.analysis.claims` computes it."""

    unit: str
    ratio: bool = False
    """Of two cases: that of `than` divided by that of `case`."""
    of: Literal["result", "traffic", "case", "gpu", "errors"] = "result"
    """What it follows from: a simulation; its HBM traffic alone; the case without simulating it; the GPU; the FP8 error
    experiment."""


QUANTITIES: Mapping[str, Quantity] = {
    "time_us": Quantity("us"),
    "tflops": Quantity("TFLOP/s"),
    "fraction": Quantity("of peak"),
    "time_ratio": Quantity("x", ratio=True),
    "hbm_gb": Quantity("GB", of="traffic"),
    "hbm_ratio": Quantity("x", ratio=True, of="traffic"),
    "hbm_formula_ratio": Quantity("x", of="traffic"),
    "memory_mib": Quantity("MiB", of="case"),
    "memory_ratio": Quantity("x", ratio=True, of="case"),
    "kernels": Quantity("launches", of="case"),
    "flop_per_exp": Quantity("FLOP", of="gpu"),
    "flop_per_fp32_flop": Quantity("FLOP", of="gpu"),
    "exp_time_fraction": Quantity("x", of="gpu"),
    "error_ratio": Quantity("x", of="errors"),
}
NO_SHAPE = {"schedule": "standard", "batch": 1, "heads": 1, "seqlen": 1, "head_dim": 1}
"""What a claim about a GPU leaves out."""


def _says(value: object) -> tuple[float, float]:
    ends: list[Any] = value if isinstance(value, list) else [value, value]
    if len(ends) != 2:
        raise ValueError(f"{shown(value)} is neither a number nor a range of two numbers")
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) or end <= 0:
            raise ValueError(f"{shown(end)} is not a number above 0")
    if ends[0] > ends[1]:
        raise ValueError(f"{shown(value)} begins above its end")
    return float(ends[0]), float(ends[1])


class _ClaimTable(BaseModel):
    """What is said; `case`, `than` and `over` are read apart."""

    model_config = ConfigDict(extra="forbid")
    claim: Name
    source: Name
    says: Annotated[tuple[float, float], BeforeValidator(_says)]
    quantity: Annotated[str, BeforeValidator(one_of("quantity", QUANTITIES))]
    why: Name | None = None
    l2: Annotated[str, BeforeValidator(one_of("l2", ["none"]))] | None = None
    up_to: StrictBool = False


_CASES = ("case", "than", "over")
_KEYS = (*_ClaimTable.model_fields, *_CASES)


@dataclass(frozen=True)
class Point:
    """One case of a claim, named by what varies; for a ratio, the case that it is compared with."""

    label: str
    case: Case | Experiment
    than: Case | None = None


@dataclass(frozen=True)
class Claim:
    """A checked claim; `says` is a range, of one point if the claim is one number."""

    claim: str
    source: str
    says: tuple[float, float]
    quantity: str
    points: tuple[Point, ...]
    why: str | None = None
    l2: bool = True
    """Whether the device has one."""
    up_to: bool = False


@dataclass(frozen=True)
class ClaimFile:
    """A checked file of claims, in their order."""

    path: str
    title: str
    claims: tuple[Claim, ...]


def is_claims(path: str | Path) -> bool:
    """Whether the file has claims. Raises InputError if it cannot be read."""
    return TABLE in read_toml(path)


def read_claims(path: str | Path) -> ClaimFile:
    """Read and check a file of claims. Raises InputError with one line per mistake in it."""
    from flashsim.io.scenario import OTHER_TABLES, TABLES

    tables = read_toml(path)
    problems = []
    for name in tables:
        if name in (*TABLES, *OTHER_TABLES) and name not in ("title", TABLE):
            problems.append(f"{path}: {name}: does not go with {TABLE}")
        elif name not in ("title", TABLE):
            problems.append(f"{path}: {unknown('key', name, ('title', TABLE))}")
    title = tables.get("title", "")
    if not isinstance(title, str):
        problems.append(f"{path}: title: {shown(title)} is not text")
    builder = CaseBuilder(Path(path).parent)
    claims = []
    for number, table in enumerate(list_of_tables(path, tables, TABLE, problems), start=1):
        reader = _Reader(f"{path}: {TABLE}[{number}]", builder)
        claims.append(reader.claim(table))
        problems += reader.problems
    if not claims and not problems:
        problems.append(f"{path}: {TABLE}: there is none")
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return ClaimFile(str(path), title, tuple(claim for claim in claims if claim is not None))


class _Reader:
    """Reads one claim; `problems` has a line for each mistake in it."""

    def __init__(self, place: str, builder: CaseBuilder) -> None:
        self.problems: list[str] = []
        self._place = place
        self._builder = builder

    def claim(self, table: Mapping[str, Any]) -> Claim | None:
        """The claim, or None if it has a mistake."""
        said = {key: value for key, value in table.items() if key not in _CASES}
        model = None
        try:
            model = _ClaimTable.model_validate(said)
        except ValidationError as error:
            lines = complaints(error, self._where(""), _KEYS)
            misspelt = [
                f"{self._place}.{key}: is required" for key in _KEYS if f"did you mean '{key}'" in " ".join(lines)
            ]
            self.problems += [line for line in lines if line not in misspelt]
        tables = {name: self._table(table, name) for name in _CASES}
        quantity = None if model is None else QUANTITIES[model.quantity]
        if model is not None and quantity is not None:
            if quantity.ratio != (tables["than"] is not None):
                self._say("than", "is required" if quantity.ratio else f"does not go with {model.quantity}")
            if model.l2 is not None and quantity.of != "traffic":
                self._say("l2", f"does not go with {model.quantity}")
        if quantity is not None and quantity.of == "errors":
            points = self._experiment(model.quantity if model else "", tables)
        else:
            points = self._points(tables, quantity)
        if model is not None and model.l2 is not None and not all(map(_has_heads_alike, points)):
            self._say("l2", "needs heads that are alike and have K and V of their own, so that one stands for all")
        if self.problems or model is None:
            return None
        rest = model.model_dump(exclude={"l2"})
        return Claim(points=tuple(points), l2=model.l2 is None, **rest)

    def _say(self, key: str, what: str) -> None:
        self.problems.append(f"{self._place}.{key}: {what}")

    def _where(self, name: str) -> Callable[[str], str]:
        return lambda key: ".".join(filter(None, (self._place, name, key)))

    def _table(self, table: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """The table of this name; None if there is none."""
        found = table.get(name)
        if found is not None and not isinstance(found, dict):
            self._say(name, f"{shown(found)} is not a table")
            return {}
        return found

    def _experiment(self, quantity: str, tables: Mapping[str, dict[str, Any] | None]) -> list[Point]:
        table = tables["case"] or {}
        if tables["over"] is not None:
            self._say("over", f"does not go with {quantity}")
        if "variants" in table:
            self._say("case.variants", f"does not go with {quantity}")
        values = table | {"variants": ERROR_VARIANTS}
        experiment, lines = check_experiment(values, self._where("case"))
        self.problems += lines
        return [] if experiment is None else [Point("", experiment)]

    def _points(self, tables: Mapping[str, dict[str, Any] | None], quantity: Quantity | None) -> list[Point]:
        """Every combination of what `over` lists, in its order; the last key moves fastest."""
        case, bad = self._fields("case", tables["case"] or {})
        than, more = self._fields("than", tables["than"] or {})
        axes, most = self._axes(tables["over"] or {})
        if quantity is not None and quantity.of == "gpu":
            case = NO_SHAPE | case
        if not tables["case"]:
            if not any(line.startswith(f"{self._place}.case: ") for line in self.problems):
                self._say("case", "is required")
            return []
        if math.prod(map(len, axes.values())) > MAX_CASES:
            self._say("over", f"has more than {MAX_CASES} cases")
            return []
        points = []
        for values in itertools.product(*axes.values()):
            varied = dict(zip(axes, values, strict=True))
            first = _merged(case, varied)
            built = [self._build("case", first, {"over": varied}, bad | most)]
            if tables["than"] is not None and built[0] is not None:
                built.append(self._build("than", _merged(first, than), {"than": than, "over": varied}, more))
            if all(built):
                label = ", ".join(f"{key} {_text(value)}" for key, value in varied.items() if len(axes[key]) > 1)
                points.append(Point(label, *(each for each in built if each is not None)))
        return points

    def _fields(self, name: str, table: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        values, lines, bad = check_fields(table, self._where(name))
        self.problems += lines
        return values, bad

    def _axes(self, table: Mapping[str, Any]) -> tuple[dict[str, list[Any]], set[str]]:
        axes: dict[str, list[Any]] = {}
        bad: set[str] = set()
        for given, choices in table.items():
            if not isinstance(choices, list) or not choices:
                self._say(f"over.{given}", f"{shown(choices)} is not a list of values")
                bad |= {given} & set(CASE_KEYS)
                continue
            for position, choice in enumerate(choices, start=1):

                def where(key: str, position: int = position) -> str:
                    return self._where("over")(f"{key}[{position}]" if key else "")

                values, lines, refused = check_fields({given: choice}, where)
                self.problems += lines
                bad |= refused
                for key, value in values.items():
                    axes.setdefault(key, []).append(value)
        return axes, bad

    def _build(
        self, name: str, values: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]], bad: set[str]
    ) -> Case | None:
        """The case; *tables* say where a key of it stands, if it is not in `case`."""

        def where(key: str) -> str:
            place = next((place for place, table in tables.items() if key in table), "case")
            return self._where(place if key else name)(key)

        case, lines = self._builder.build(values, where, bad)
        self.problems += lines
        return case


def _has_heads_alike(point: Point) -> bool:
    cases = [case for case in (point.case, point.than) if isinstance(case, Case)]
    return all(case.problem.heads_per_kv == 1 and not case.problem.mask_rule.by_batch for case in cases)


def _merged(case: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """*case* with the keys of *other*; switches are merged, unless *other* is another schedule."""
    another = other.get("schedule", case.get("schedule")) != case.get("schedule")
    switches = ({} if another else case.get("set", {})) | other.get("set", {})
    return {**case, **other, "set": switches}


def _text(value: object) -> str:
    return (option_text(value) or "{}") if isinstance(value, dict) else str(value)
