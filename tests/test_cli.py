"""The command line: exit codes, JSON keys, one line for every mistake, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashsim.cli import main
from flashsim.errors import Hazard
from flashsim.io.measured import COLUMNS
from flashsim.problem import DIRECTIONS, DTYPES
from flashsim.simulate import simulate

ROOT = Path(__file__).parents[1]
SIZES = {"--batch": "1", "--heads": "4", "--seqlen": "256", "--head-dim": "64"}
SCENARIO = """
title = "Small"
[case]
gpu = "h100-sxm5"
schedule = "fa3"
batch = 1
heads = 4
seqlen = 256
head_dim = 64
[grid]
mask = ["full", "causal"]
[[measured]]
mask = "full"
time_us = 10
source = "a test"
"""
ROW = (
    "r0,s,a test,h100-sxm5,1500,fa3,,fwd,fp16,1,4,4,256,256,64,64,full,0,10,,std,table,\n"
    "r1,s,a test,h100-sxm5,1500,fa9,,fwd,fp16,1,4,4,256,256,64,64,full,0,10,,std,table,\n"
)


class Run:
    """What one call of the command line came to."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = main(list(arguments))
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        assert all(line.startswith("error: ") for line in self.err.splitlines()), self.err
        return [line.removeprefix("error: ") for line in self.err.splitlines()]


def simulate_options(**changes: str | None) -> list[str]:
    """The options of a small `simulate`; None leaves one out."""
    options: dict[str, str | None] = {
        **SIZES,
        **{f"--{key.replace('_', '-')}": value for key, value in changes.items()},
    }
    return [part for key, value in options.items() if value is not None for part in (key, value)]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(COLUMNS) + "\n" + ROW, encoding="utf-8")
    return path


SIMULATE_KEYS = {
    "time_us": None,
    "tflops": None,
    "clock_mhz": None,
    "clock_source": None,
    "flops": None,
    "flops_executed": None,
    "hbm_bytes": {"read", "written"},
    "utilization": {"tensor", "exp", "fma", "alu", "smem", "tma", "issue", "l2", "hbm"},
    "bound_by": None,
    "kernels": None,
    "schedule": None,
    "gpu": None,
    "tile": {"BLOCK_M", "BLOCK_N"},
    "options": None,
    "flashsim_version": None,
    "device_hash": None,
}


def test_simulate_json_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "simulate", *simulate_options(clock_mhz="1500"), "--set", "num_stages=1", "--json")
    assert run.code == 0
    assert run.err == ""
    for key, parts in SIMULATE_KEYS.items():
        assert key in run.json
        assert parts is None or parts <= set(run.json[key])
    assert all(set(unit) == {"active", "elapsed"} for unit in run.json["utilization"].values())
    assert set(run.json["kernels"][0]) >= {"name", "time_us"}
    assert (run.json["clock_mhz"], run.json["clock_source"]) == (1500, "given")
    assert run.json["options"]["num_stages"] == 1
    assert run.json["functional"] is None


def test_simulate_is_what_python_says(capsys: pytest.CaptureFixture[str]) -> None:
    from flashsim.problem import AttentionProblem

    run = Run(capsys, "simulate", *simulate_options(kv_heads="2", mask="causal", schedule="fa2"), "--json")
    problem = AttentionProblem(batch=1, heads_q=4, heads_kv=2, seqlen_q=256, head_dim=64, mask="causal")
    assert run.json == json.loads(json.dumps(simulate(problem, "fa2").to_json()))


def test_simulate_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "simulate", *simulate_options())
    assert run.code == 0
    for part in ("fa3 on h100-sxm5", "% of peak", "bound by", "1830 MHz (assumed", "CTAs per SM"):
        assert part in run.out


def test_functional_reports_errors(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "simulate", *simulate_options(), "--functional", "--json")
    assert run.code == 0
    keys = {"max_abs_error", "mean_abs_error", "lse_max_abs_error", "accepted", "hazards", "gradient_max_abs_error"}
    assert set(run.json["functional"]) == keys
    assert run.json["functional"]["accepted"] is True
    assert 0 < run.json["functional"]["max_abs_error"] < 1e-9
    people = Run(capsys, "simulate", *simulate_options(), "--functional")
    assert "accepted" in people.out
    other = Run(capsys, "simulate", *simulate_options(), "--functional", "--seed", "1", "--json")
    assert other.json["functional"]["max_abs_error"] != run.json["functional"]["max_abs_error"]


def test_a_wrong_result_is_exit_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    def rejected(*arguments: Any, **options: Any) -> Any:
        result = simulate(*arguments, **options)
        assert result.functional is not None
        return dataclasses.replace(result, functional=dataclasses.replace(result.functional, accepted=False))

    monkeypatch.setattr(sys.modules["flashsim.simulate"], "simulate", rejected)
    run = Run(capsys, "simulate", *simulate_options(), "--functional")
    assert run.code == 1
    assert "NOT accepted" in run.out


def test_a_hazard_is_exit_1_without_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise Hazard("K[0] overwritten at 12 clk\n  by producer\n  while consumer 0 reads")

    monkeypatch.setattr(sys.modules["flashsim.simulate"], "simulate", fail)
    run = Run(capsys, "simulate", *simulate_options(), "--functional", "--json")
    assert run.code == 1
    assert run.json["functional"]["accepted"] is False
    assert "K[0] overwritten" in run.json["functional"]["hazards"][0]
    assert run.err.startswith("error: Hazard: K[0] overwritten at 12 clk\n  by producer")
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gpu": "h100-sxm"}, "--gpu: unknown GPU 'h100-sxm', did you mean 'h100-sxm5'?"),
        ({"gpu": "./none.toml"}, "--gpu: ./none.toml: no such file"),
        ({"schedule": "fa33"}, "--schedule: unknown schedule 'fa33', did you mean 'fa3'?"),
        ({"mask": "cosual"}, "--mask: unknown mask 'cosual', did you mean 'causal'?"),
        ({"dtype": "fp61"}, "--dtype: unknown dtype 'fp61', did you mean 'fp16'?"),
        ({"direction": "fwdd"}, "--direction: unknown direction 'fwdd', did you mean 'fwd'?"),
        ({"set": "bild=2024-07"}, "unknown switch of fa3 'bild', did you mean 'build'?"),
        ({"set": "build=2024"}, "unknown value '2024', did you mean '2024-07'?"),
        ({"set": "pingpong"}, "--set: 'pingpong' is not KEY=VALUE"),
        ({"batch": "0"}, "--batch: got 0, must be a whole number"),
        ({"batch": "-1"}, "--batch: got -1, must be a whole number"),
        ({"batch": "1e3"}, "--batch: got '1e3', must be a whole number"),
        ({"batch": "abc"}, "--batch: got 'abc', must be a whole number"),
        ({"seqlen": "nan"}, "--seqlen: got 'nan', must be a whole number"),
        ({"seqlen": "1.5"}, "--seqlen: got '1.5', must be a whole number"),
        ({"seqlen": "9" * 5000}, "--seqlen: got 9999"),
        ({"seqlen": ""}, "--seqlen: got '', must be a whole number"),
        ({"head_dim": "1000"}, "--head-dim: got 1000, must be a whole number from 1 to 512"),
        ({"heads": None}, "--heads: is required"),
        ({"kv_heads": "3"}, "--kv-heads: got 3, must divide heads_q = 4"),
        ({"clock_mhz": "nan"}, "--clock-mhz: nan is not a finite number"),
        ({"clock_mhz": "fast"}, "--clock-mhz: 'fast' is not a number"),
        ({"clock_mhz": "-1500"}, "--clock-mhz: -1500 is not between 100 and 10000 MHz"),
        ({"dropout": "often"}, "--dropout: 'often' is not a number"),
        ({"seed": "-1"}, "--seed: -1 is negative"),
        ({"batch": "2000000000"}, "GB"),
        ({"set": "BLOCK_N=4096"}, "BLOCK_N"),
        ({"gpu": "a100-sxm4-80gb"}, "schedule fa3 does not run on ampere"),
    ],
)
def test_each_mistake_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], complaint: str
) -> None:
    run = Run(capsys, "simulate", *simulate_options(**changes), "--json")
    assert run.code == 2
    assert run.out == ""
    (line,) = run.errors
    assert complaint in line


def test_all_mistakes_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = simulate_options(
        gpu="h100", schedule="fa33", batch="x", mask="cosual", clock_mhz="x", seed="x", heads=None
    )
    run = Run(capsys, "simulate", *options)
    places = ("--gpu", "--schedule", "--batch", "--mask", "--clock-mhz", "--seed", "--heads")
    assert run.code == 2
    assert sorted(line.split(":")[0] for line in run.errors) == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["simulat"], "unknown command 'simulat', did you mean 'simulate'?"),
        (["simulate", "--bacth", "4"], "unknown option '--bacth', did you mean '--batch'?"),
        (["simulate", "--batch"], "--batch"),
        (["run"], "Missing argument 'SCENARIO'"),
        (["run", "none.toml"], "none.toml: no such file"),
        (["run", "a", "b"], "unexpected extra argument"),
        (["accuracy", "none.csv"], "none.csv: no such file"),
        (["gpus", "h10"], "unknown GPU 'h10'"),
        (["schedules", "fa33"], "unknown schedule 'fa33', did you mean 'fa3'?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    run = Run(capsys, *arguments)
    assert run.code == 2
    (line,) = run.errors
    assert complaint in line


def test_a_device_file_with_a_bare_and_a_missing_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from flashsim import devices

    lines = (Path(devices.__file__).parent / "h100-sxm5.toml").read_text(encoding="utf-8").splitlines()
    broken = ["count = 132" if line.startswith("count = ") else line for line in lines if not line.startswith("tdp_w")]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(broken), encoding="utf-8")
    run = Run(capsys, "simulate", *simulate_options(gpu=str(path)))
    assert run.code == 2
    assert len(run.errors) == 2
    assert any("sm.count" in line and "132" in line for line in run.errors)
    assert any("power.tdp_w" in line for line in run.errors)


def test_run_prints_every_case_beside_its_measurement(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    run = Run(capsys, "run", str(scenario))
    assert run.code == 0
    assert run.err == ""
    lines = run.out.splitlines()
    assert lines[0] == "Small"
    (full,) = [line for line in lines if line.startswith("full ")]
    (causal,) = [line for line in lines if line.startswith("causal ")]
    assert full.split()[-1].startswith(("+", "-"))
    assert causal.split()[-2:] == ["-", "-"]
    assert any(line.startswith("clock: h100-sxm5 at 1830 MHz (assumed") for line in lines)
    table = [line for line in lines if "tensor" in line or line.startswith(("full", "causal", "---"))]
    assert max(map(len, table)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_run_json(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    run = Run(capsys, "run", str(scenario), "--json")
    assert run.code == 0
    full, causal = run.json["cases"]
    assert run.json["complete"] is True
    assert full["case"]["mask"] == "full"
    assert set(full["result"]) >= set(SIMULATE_KEYS)
    assert full["error"] == pytest.approx(full["result"]["time_us"] / 10 - 1)
    assert full["measured"]["source"] == "a test"
    assert causal["measured"] is None
    assert causal["error"] is None


def test_run_writes_its_json_to_a_file(capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = Run(capsys, "run", str(scenario), "--json", "--output", str(path))
    assert path.read_text(encoding="utf-8") == run.out


def test_an_unwritable_output_is_found_before_the_work(
    capsys: pytest.CaptureFixture[str], scenario: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flashsim.analysis.accuracy
    import flashsim.analysis.run

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work must not start")

    monkeypatch.setattr(flashsim.analysis.run, "simulate", never)
    monkeypatch.setattr(sys.modules["flashsim.analysis.accuracy"], "simulate", never)
    for command, given in (("run", scenario), ("accuracy", rows)):
        run = Run(capsys, command, str(given), "--output", str(tmp_path / "none" / "out.json"))
        assert run.code == 2
        (line,) = run.errors
        assert "--output" in line


def test_a_scenario_that_does_not_fit_leaves_no_output(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path
) -> None:
    scenario.write_text(SCENARIO.replace("batch = 1", "batch = 2000000000"), encoding="utf-8")
    run = Run(capsys, "run", str(scenario), "--output", str(tmp_path / "out.json"))
    assert run.code == 2
    assert run.out == ""
    assert len(run.errors) == 2
    assert list(tmp_path.iterdir()) == [scenario]


def test_ctrl_c_prints_what_was_finished(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flashsim.analysis.run

    def second_is_interrupted(problem: Any, *arguments: Any, **options: Any) -> Any:
        if problem.mask == "causal":
            raise KeyboardInterrupt
        return simulate(problem, *arguments, **options)

    monkeypatch.setattr(flashsim.analysis.run, "simulate", second_is_interrupted)
    path = tmp_path / "out.json"
    run = Run(capsys, "run", str(scenario), "--json", "--output", str(path))
    assert run.code == 130
    assert run.json["complete"] is False
    assert [case["case"]["mask"] for case in run.json["cases"]] == ["full"]
    assert json.loads(path.read_text(encoding="utf-8")) == run.json
    assert run.errors == ["interrupted after 1 of 2"]


def test_ctrl_c_in_simulate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["flashsim.simulate"], "simulate", interrupted)
    assert Run(capsys, "simulate", *simulate_options()).code == 130


def test_accuracy_json(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    run = Run(capsys, "accuracy", str(rows), "--by", "schedule,mask", "--json")
    assert run.code == 0
    assert (run.json["rows"], run.json["predicted"], run.json["skipped"]) == (2, 1, {"schedule fa9": 1})
    assert run.json["predictions"][0]["id"] == "r0"
    assert run.json["groups"][0]["mask"] == "full"


def test_accuracy_for_people(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    run = Run(capsys, "accuracy", str(rows))
    assert run.code == 0
    assert "2 rows: 1 predicted, 1 skipped" in run.out
    assert "skipped 1: schedule fa9" in run.out
    assert "1500 (row)" in run.out


def test_accuracy_names_broken_rows_sessions_and_columns_at_once(
    capsys: pytest.CaptureFixture[str], rows: Path, tmp_path: Path
) -> None:
    rows.write_text(",".join(COLUMNS) + "\n" + ROW.replace("fp16,1,4", "fp16,one,4"), encoding="utf-8")
    (tmp_path / "sessions.toml").write_text("[s]\nclock_mhz = 'fast'\n", encoding="utf-8")
    run = Run(capsys, "accuracy", str(rows), "--by", "shedule")
    assert run.code == 2
    assert run.out == ""
    parts = ("(r0): batch", "(r1): batch", "s.clock_mhz", "did you mean 'schedule'")
    assert all(part in line for part, line in zip(parts, run.errors, strict=True)), run.errors


def test_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    from flashsim.devices import device_names

    people, machine = Run(capsys, "gpus"), Run(capsys, "gpus", "--json")
    assert [gpu["name"] for gpu in machine.json["gpus"]] == list(device_names())
    assert all(name in people.out for name in device_names())


def test_gpus_prints_every_number_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    from flashsim.devices import load_device

    people, machine = Run(capsys, "gpus", "h100-sxm5"), Run(capsys, "gpus", "h100-sxm5", "--json")
    citations = load_device("h100-sxm5").citations
    assert set(machine.json["numbers"]) == set(citations)
    for name, cited in citations.items():
        assert set(machine.json["numbers"][name]) == {"value", "status", "source", "note"}
        (line,) = [line for line in people.out.splitlines() if line.startswith(f"{name} ")]
        assert cited.status in line
        assert cited.source in line


def test_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    from flashsim.schedules import load_schedule, schedule_names

    machine = Run(capsys, "schedules", "--json")
    assert [schedule["name"] for schedule in machine.json["schedules"]] == list(schedule_names())
    people, machine = Run(capsys, "schedules", "fa3"), Run(capsys, "schedules", "fa3", "--json")
    for switch, known in zip(machine.json["switches"], load_schedule("fa3").switches(), strict=True):
        assert set(switch) == {"name", "type", "default", "choices", "help"}
        assert switch["name"] == known.name
        assert known.name in people.out


def test_no_arguments_print_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys)
    assert run.code == 0
    for command in ("run", "simulate", "accuracy", "gpus", "schedules"):
        assert f"  {command} " in run.out


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashsim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def test_the_same_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Results do not depend on what the process did before."""
    here = Run(capsys, "simulate", *simulate_options(), "--json")
    there = in_a_process("simulate", *simulate_options(), "--json")
    assert (there.returncode, there.stdout, there.stderr) == (0, here.out, "")


def test_version() -> None:
    import flashsim

    assert in_a_process("--version").stdout == f"flashsim {flashsim.__version__}\n"


def test_a_terminal_without_unicode_is_enough() -> None:
    run = in_a_process("gpus", "h100-sxm5", env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.isascii()


@pytest.mark.skipif(os.name == "nt", reason="pipes are closed differently there")
def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = f"{sys.executable} -m flashsim gpus h100-sxm5 | head -n 1"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.startswith("h100-sxm5")
    assert run.stderr == ""


def test_the_help_of_simulate_names_every_dtype_and_direction(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for option, values in (("--dtype", DTYPES), ("--direction", DIRECTIONS)):
        (line,) = (line for line in lines if line.strip().startswith(f"{option} "))
        assert all(value in line.replace(",", " ").replace(".", " ").split() for value in values)
