"""How far predictions are from measured times.

error = predicted time / measured time - 1. Every row of a file is either predicted or skipped with a reason; none is
dropped silently and no parameter is fitted here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashsim.analysis.parallel import in_order
from flashsim.devices import DeviceSpec, device_names, load_device
from flashsim.errors import Infeasible, InputError, SimulationError, unknown
from flashsim.io.measured import COLUMNS, MeasuredRow, read_measured, read_sessions
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule, schedule_names
from flashsim.schedules.base import Schedule
from flashsim.simulate import simulate

GROUP_KEYS = tuple(name for name in COLUMNS if name not in ("id", "time_us", "tflops", "notes"))
"""What `by` may name."""


@dataclass(frozen=True)
class Prediction:
    """One row, predicted. Times in microseconds; `clock_source` is `row`, `sessions.toml` or what `simulate` says."""

    row: MeasuredRow
    predicted_us: float
    measured_us: float
    clock_mhz: float
    clock_source: str

    @property
    def error(self) -> float:
        """Predicted time / measured time - 1."""
        return self.predicted_us / self.measured_us - 1

    def to_json(self) -> dict[str, Any]:
        """The row's id and session with the times, error and clock."""
        own = {key: value for key, value in vars(self).items() if key != "row"}
        return {"id": self.row.id, "session": self.row.session, **own, "error": self.error}


@dataclass(frozen=True)
class Skipped:
    """One row that flashsim cannot predict, and why."""

    row: MeasuredRow
    reason: str


@dataclass(frozen=True)
class ErrorStatistics:
    """Of the errors of `n` rows: mean absolute, largest absolute, mean; and Kendall's tau-b of predicted and measured
    times, None below three rows or where all are equal. All None without rows."""

    n: int
    mape: float | None
    max_abs_error: float | None
    bias: float | None
    kendall_tau: float | None


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy over a file; `sessions` and `groups` break it down, `clocks` says what clock each session ran at."""

    rows: int
    predictions: tuple[Prediction, ...]
    skipped: dict[str, int]
    total: ErrorStatistics
    sessions: dict[str, ErrorStatistics]
    clocks: dict[str, tuple[dict[str, Any], ...]]
    by: tuple[str, ...] = ()
    groups: tuple[tuple[dict[str, Any], ErrorStatistics], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys, as `flashsim accuracy --json` prints it."""
        total = asdict(self.total)
        return {
            "rows": self.rows,
            "predicted": total.pop("n"),
            "skipped": self.skipped,
            **{key: value for key, value in total.items() if key != "kendall_tau"},
            "sessions": {
                name: {**asdict(statistics), "clocks": list(self.clocks[name])}
                for name, statistics in self.sessions.items()
            },
            "by": list(self.by),
            "groups": [{**key, **asdict(statistics)} for key, statistics in self.groups],
            "predictions": [prediction.to_json() for prediction in self.predictions],
        }


def accuracy(
    measured: str | Path | Sequence[MeasuredRow],
    by: Sequence[str] = (),
    sessions: Mapping[str, Mapping[str, Any]] | None = None,
) -> AccuracyReport:
    """Predict every row of *measured*, a CSV file of measured rows or the rows themselves, and compare.

    *by* names columns to group the errors by. *sessions* says what is known of each session; by default that is
    `sessions.toml` beside the file. Raises InputError for a file that does not read or an unknown column.
    """
    check_columns(by)
    if isinstance(measured, str | Path):
        rows: Sequence[MeasuredRow] = read_measured(measured)
        sessions = sessions_beside(measured) if sessions is None else sessions
    else:
        rows = measured
    return summarize(rows, list(predict(rows, sessions or {})), by)


def check_columns(by: Iterable[str]) -> None:
    """Raises InputError for every name that is no column to group by."""
    if problems := [unknown("column to group by", name, GROUP_KEYS) for name in by if name not in GROUP_KEYS]:
        raise InputError(problems)


def sessions_beside(path: str | Path) -> dict[str, dict[str, Any]]:
    """What `sessions.toml` in the folder of *path* says; empty without such a file."""
    return read_sessions(Path(path).parent / "sessions.toml")


def predict(
    rows: Sequence[MeasuredRow], sessions: Mapping[str, Mapping[str, Any]], workers: int = 1
) -> Iterator[Prediction | Skipped]:
    """Simulate the rows, on `workers` processes, in their order."""
    work = [(row, sessions.get(row.session, {}).get("clock_mhz")) for row in rows]
    return in_order(predict_row, work, workers)


def predict_row(work: tuple[MeasuredRow, float | None]) -> Prediction | Skipped:
    """Simulate one row, given the clock of its session: at the row's clock, else that one, else the device's."""
    row, session_clock = work
    clock, source = (row.clock_mhz, "row") if row.clock_mhz else (session_clock, "sessions.toml")
    try:
        gpu = load_device(row.device) if row.device in device_names() else None
        schedule = load_schedule(row.schedule) if row.schedule in schedule_names() else None
        problem = _problem(row, gpu, schedule)
        result = simulate(problem, schedule, gpu, clock_mhz=clock, options=row.options)  # type: ignore[arg-type]
    except _Unsupported as unsupported:
        return Skipped(row, str(unsupported))
    except Infeasible:
        return Skipped(row, f"{row.schedule} does not fit {row.device}")
    except InputError as error:
        return Skipped(row, error.problems[0])
    except SimulationError as error:
        error.add_note(f"in row {row.id} of session {row.session}")
        raise
    measured_us = row.time_us or result.flops / row.tflops / 1e6  # type: ignore[operator]
    return Prediction(row, result.time_us, measured_us, result.clock_mhz, source if clock else result.clock_source)


class _Unsupported(Exception):
    """The row names something that flashsim does not have."""


def _problem(row: MeasuredRow, gpu: DeviceSpec | None, schedule: type[Schedule] | None) -> AttentionProblem:
    """The row's problem. Raises _Unsupported with a short reason, one that many rows can share."""
    if gpu is None:
        raise _Unsupported(f"device {row.device}")
    if schedule is None:
        raise _Unsupported(f"schedule {row.schedule}")
    kind_of_mask = row.mask.partition(":")[0]
    try:
        problem = AttentionProblem(
            batch=row.batch,
            heads_q=row.heads_q,
            heads_kv=row.heads_kv,
            seqlen_q=row.seqlen_q,
            seqlen_k=row.seqlen_k,
            head_dim=row.head_dim,
            head_dim_v=row.head_dim_v,
            dtype=row.dtype,
            mask=row.mask,
            direction=row.direction,
            dropout=row.dropout,
        )
    except InputError as error:
        refused = {line.partition(":")[0] for line in error.problems}
        reasons = {"direction": row.direction, "dtype": row.dtype, "mask": kind_of_mask, "dropout": ""}
        for field, value in reasons.items():
            if field in refused:
                raise _Unsupported(f"{field} {value}".strip()) from None
        raise
    for field, value, has in (
        ("direction", row.direction, schedule.directions),
        ("dtype", row.dtype, schedule.dtypes),
        ("mask", kind_of_mask, schedule.masks),
    ):
        if value not in has:
            raise _Unsupported(f"{field} {value} of {row.schedule}")
    if row.dropout and not schedule.dropout:
        raise _Unsupported(f"dropout of {row.schedule}")
    if gpu.architecture not in schedule.architectures:
        raise _Unsupported(f"{row.schedule} on {row.device}")
    switches = {switch.name for switch in schedule.switches()}
    for name in row.options:
        if name not in switches:
            raise _Unsupported(f"option {name} of {row.schedule}")
    return problem


def summarize(
    rows: Sequence[MeasuredRow], outcomes: Iterable[Prediction | Skipped], by: Sequence[str] = ()
) -> AccuracyReport:
    """The report over *outcomes*, which may be fewer than *rows* if the work was interrupted."""
    outcomes = list(outcomes)
    predictions = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
    reasons = Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Skipped))
    sessions = _grouped(predictions, lambda prediction: prediction.row.session)
    groups = _grouped(predictions, lambda prediction: tuple(_value(prediction.row, key) for key in by)) if by else {}
    return AccuracyReport(
        rows=len(rows),
        predictions=tuple(predictions),
        skipped=dict(reasons.most_common()),
        total=statistics(predictions),
        sessions={name: statistics(members) for name, members in sessions.items()},
        clocks={name: _clocks(members) for name, members in sessions.items()},
        by=tuple(by),
        groups=tuple((dict(zip(by, key, strict=True)), statistics(members)) for key, members in groups.items()),
    )


def _value(row: MeasuredRow, key: str) -> Any:
    from flashsim.io.measured import option_text

    return option_text(row.options) if key == "options" else getattr(row, key)


def _grouped(predictions: Iterable[Prediction], key: Callable[[Prediction], Any]) -> dict[Any, list[Prediction]]:
    groups: dict[Any, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(key(prediction), []).append(prediction)
    return groups


def _clocks(predictions: Iterable[Prediction]) -> tuple[dict[str, Any], ...]:
    counts = Counter((prediction.clock_mhz, prediction.clock_source) for prediction in predictions)
    return tuple({"clock_mhz": clock, "clock_source": source, "n": n} for (clock, source), n in counts.items())


def statistics(predictions: Sequence[Prediction]) -> ErrorStatistics:
    """Statistics of the errors of *predictions*."""
    errors = [prediction.error for prediction in predictions]
    if not errors:
        return ErrorStatistics(0, None, None, None, None)
    sizes = [abs(error) for error in errors]
    tau = kendall_tau([p.predicted_us for p in predictions], [p.measured_us for p in predictions])
    return ErrorStatistics(len(errors), math.fsum(sizes) / len(sizes), max(sizes), math.fsum(errors) / len(errors), tau)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b of two equally long sequences; None below three pairs, or if one of them is constant.

    (concordant - discordant) / sqrt((pairs not tied in x) (pairs not tied in y)); Kendall, Biometrika 33 (1945).
    """
    if len(x) < 3:
        return None
    score = untied_x = untied_y = 0
    for i in range(len(x)):
        for j in range(i):
            sign_x = (x[i] > x[j]) - (x[i] < x[j])
            sign_y = (y[i] > y[j]) - (y[i] < y[j])
            score += sign_x * sign_y
            untied_x += sign_x != 0
            untied_y += sign_y != 0
    return score / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None
