"""Prediction error against measured times: its definition, its clock, what is skipped and why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsim.analysis.accuracy import AccuracyReport, accuracy, kendall_tau
from flashsim.errors import InputError, SimulationError
from flashsim.io.measured import COLUMNS, MeasuredRow
from flashsim.problem import AttentionProblem
from flashsim.simulate import simulate

PROBLEM = AttentionProblem(batch=1, heads_q=4, seqlen_q=256, head_dim=64)
ROW: dict[str, Any] = {
    "session": "s",
    "source": "a test",
    "device": "h100-sxm5",
    "schedule": "fa3",
    "options": "",
    "direction": "fwd",
    "dtype": "fp16",
    "batch": 1,
    "heads_q": 4,
    "heads_kv": 4,
    "seqlen_q": 256,
    "seqlen_k": 256,
    "head_dim": 64,
    "head_dim_v": 64,
    "mask": "full",
    "dropout": 0,
    "flop_convention": "std",
    "value_kind": "measured",
}


def rows(*changes: dict[str, Any]) -> list[MeasuredRow]:
    return [
        MeasuredRow.model_validate({"id": f"r{number}", **ROW, "time_us": 10.0, **change})
        for number, change in enumerate(changes)
    ]


def test_error_is_predicted_over_measured_less_one() -> None:
    predicted = simulate(PROBLEM).time_us
    report = accuracy(rows({"time_us": predicted / 1.25}, {"time_us": predicted / 0.5}, {"time_us": predicted}))
    assert [p.error for p in report.predictions] == pytest.approx([0.25, -0.5, 0])
    assert report.total.n == 3
    assert report.total.mape == pytest.approx(0.25)
    assert report.total.max_abs_error == pytest.approx(0.5)
    assert report.total.bias == pytest.approx(-0.25 / 3)


def test_a_rate_is_a_time() -> None:
    result = simulate(PROBLEM)
    (prediction,) = accuracy(rows({"time_us": None, "tflops": result.tflops / 2})).predictions
    assert prediction.measured_us == pytest.approx(2 * result.time_us)


@pytest.mark.parametrize(
    ("row_clock", "session_clock", "clock", "source"),
    [
        (1500, None, 1500, "row"),
        (1500, 1200, 1500, "row"),
        (None, 1200, 1200, "sessions.toml"),
        (None, None, 1830, "datasheet"),
    ],
)
def test_the_clock_is_the_rows_then_the_sessions_then_the_devices(
    row_clock: float | None, session_clock: float | None, clock: float, source: str
) -> None:
    known = {} if session_clock is None else {"s": {"clock_mhz": session_clock}}
    report = accuracy(rows({"clock_mhz": row_clock}), sessions=known)
    (prediction,) = report.predictions
    assert (prediction.clock_mhz, prediction.clock_source) == (clock, source)
    assert prediction.predicted_us == simulate(PROBLEM, clock_mhz=clock).time_us
    assert report.clocks == {"s": ({"clock_mhz": clock, "clock_source": source, "n": 1},)}


def test_options_are_the_schedules_switches() -> None:
    (prediction,) = accuracy(rows({"options": {"num_stages": "1"}})).predictions
    assert prediction.predicted_us == simulate(PROBLEM, options={"num_stages": 1}).time_us


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "tpu-v5e"}, "device tpu-v5e"),
        ({"schedule": "fa9"}, "schedule fa9"),
        ({"direction": "sideways"}, "direction sideways"),
        ({"dtype": "fp4"}, "dtype fp4"),
        ({"mask": "spiral:7"}, "mask spiral"),
        ({"options": {"turbo": "true"}}, "option turbo of fa3"),
        ({"device": "l4"}, "fa3 on l4"),
    ],
)
def test_what_flashsim_lacks_is_skipped_with_a_reason(change: dict[str, Any], reason: str) -> None:
    report = accuracy(rows(change, change, {}))
    assert report.skipped == {reason: 2}
    assert report.total.n == 1


def test_a_problem_that_does_not_fit_is_skipped() -> None:
    report = accuracy(rows({"batch": 2**20, "seqlen_q": 2**20, "seqlen_k": 2**20}))
    assert sum(report.skipped.values()) == 1


def test_without_predictions_there_is_no_error() -> None:
    report = accuracy(rows({"schedule": "fa9"}))
    assert (report.total.n, report.total.mape, report.total.bias) == (0, None, None)
    assert report.sessions == {}


def test_groups() -> None:
    report = accuracy(rows({}, {"mask": "causal"}, {"mask": "causal", "schedule": "fa2"}), by=["mask", "schedule"])
    assert [(key["mask"], key["schedule"], statistics.n) for key, statistics in report.groups] == [
        ("full", "fa3", 1),
        ("causal", "fa3", 1),
        ("causal", "fa2", 1),
    ]


def test_an_unknown_column_is_bad_input() -> None:
    with pytest.raises(InputError, match="did you mean 'schedule'"):
        accuracy(rows({}), by=["shedule"])


def test_a_failed_simulation_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SimulationError("stuck")

    monkeypatch.setattr("flashsim.analysis.accuracy.simulate", fail)
    with pytest.raises(SimulationError) as caught:
        accuracy(rows({}))
    assert caught.value.__notes__ == ["in row r0 of session s"]


def report_of_a_file(folder: Path) -> AccuracyReport:
    lines = [",".join(COLUMNS)]
    for number, seqlen in enumerate((512, 1024, 2048)):
        row = ROW | {"id": f"r{number}", "seqlen_q": seqlen, "seqlen_k": seqlen, "time_us": 20 * (number + 1)}
        lines.append(",".join(str(row.get(name, "")) for name in COLUMNS))
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "sessions.toml").write_text("[s]\nclock_mhz = 1500\n", encoding="utf-8")
    return accuracy(folder / "rows.csv", by=["schedule"])


def test_a_file_is_read_with_the_sessions_beside_it(tmp_path: Path) -> None:
    report = report_of_a_file(tmp_path)
    assert {prediction.clock_mhz for prediction in report.predictions} == {1500}
    assert report.sessions["s"].kendall_tau == 1


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    report = json.loads(json.dumps(report_of_a_file(tmp_path).to_json(), allow_nan=False))
    assert set(report) >= {"rows", "predicted", "skipped", "mape", "max_abs_error", "bias", "sessions", "predictions"}
    assert set(report["sessions"]["s"]) >= {"n", "mape", "max_abs_error", "bias", "kendall_tau"}
    assert set(report["predictions"][0]) >= {"id", "predicted_us", "measured_us", "error"}
    assert (report["rows"], report["predicted"], report["skipped"]) == (3, 3, {})
    assert report["groups"][0]["schedule"] == "fa3"


def test_tau_needs_three_rows() -> None:
    assert kendall_tau([1, 2], [1, 2]) is None
    assert kendall_tau([1, 2, 3], [5, 5, 5]) is None
    assert kendall_tau([1, 2, 3], [1, 2, 3]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1


def test_tau_b_with_ties() -> None:
    """By hand: of six pairs four agree, one is discordant and one is tied in x alone: 3 / sqrt(5 * 6)."""
    assert kendall_tau([1, 1, 2, 3], [1, 2, 4, 3]) == pytest.approx(3 / math.sqrt(30))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_tau_is_symmetric_and_turns_with_one_axis(pairs: list[tuple[int, int]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    tau = kendall_tau(x, y)
    assert tau == kendall_tau(y, x)
    turned = kendall_tau(x, [-b for b in y])
    assert turned == (None if tau is None else -tau)
    assert tau is None or -1 - 1e-12 <= tau <= 1 + 1e-12
