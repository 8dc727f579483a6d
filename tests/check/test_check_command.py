"""`flashsim check` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsim import schedules
from flashsim.check import survey
from flashsim.cli import main
from flashsim.schedules import schedule_names


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """fa2 that does not wait for V."""
    text = (Path(schedules.__file__).parent / "fa2.py").read_text(encoding="utf-8")
    path = tmp_path / "wrong.py"
    path.write_text(text.replace("                yield v\n", "                pass\n"), encoding="utf-8")
    return f"{path}:FA2"


def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "all", "--examples", "3", "--seed", "7")
    assert (code, err) == (0, "")
    words = "exact, and without race, hazard or deadlock"
    assert out.splitlines() == [f"{name}: 3 examples, seed 7: {words}" for name in schedule_names()]


def test_json_of_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "fa2", "--examples", "3", "--json")
    assert code == 0
    assert json.loads(out) == {
        "passed": True,
        "checks": [
            {
                "schedule": "fa2",
                "passed": True,
                "examples": 3,
                "seed": 0,
                "replay": "flashsim check fa2 --examples 3 --seed 0",
                "failure": None,
            }
        ],
    }


def test_a_wrong_schedule_is_exit_1(capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    code, out, err = run(capsys, wrong)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{wrong}: Race in example ")
    assert lines[1].startswith("race on V: nothing orders load(V(batch 0, head 0, rows ")
    assert any(
        line.startswith("smallest problem found: batch 1, heads 1/1, seqlen 1/1, head dim 16/16") for line in lines
    )
    assert lines[-1] == f"replay: flashsim check {wrong} --examples 200 --seed 0"


def test_json_of_a_failure(capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    code, out, _ = run(capsys, wrong, "--json")
    report = json.loads(out)
    assert code == 1
    assert not report["passed"]
    failure = report["checks"][0]["failure"]
    assert failure.keys() == {"kind", "message", "example", "timeline"}
    assert failure["example"].keys() == {
        "problem", "switches", "gpu", "sms", "inputs", "latencies", "rounded"
    }  # fmt: skip
    assert len(failure["timeline"]) >= 2


def test_mutants(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "TRIED", 4)
    monkeypatch.setattr(survey, "in_order", lambda work, items, workers: map(work, items))
    code, out, err = run(capsys, "standard", "--mutants")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "standard"
    assert lines[1].split() == ["line", "function", "statement", "change", "outcome", "by,", "or", "why"]
    assert lines[-2] == "standard: 12 mutants: 10 killed, 2 equivalent"


def test_json_of_mutants(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A survivor without a reason is a failure."""
    text = (Path(schedules.__file__).parent / "standard.py").read_text(encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(survey, "TRIED", 4)
    monkeypatch.setattr(survey, "in_order", lambda work, items, workers: map(work, items))
    code, out, _ = run(capsys, f"{path}:Standard", "--mutants", "--json")
    report: dict[str, Any] = json.loads(out)
    assert code == 1
    assert not report["passed"]
    (found,) = report["surveys"]
    assert found["counts"] == {"killed": 10, "equivalent": 1, "invalid": 0, "not run": 0, "survived": 1}
    assert found["mutants"][0].keys() == {"function", "line", "statement", "change", "outcome", "how", "runs"}


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["fa9"], ["unknown schedule 'fa9', did you mean 'fa3'? (allowed: standard, fa2, fa3, path/to/file.py:Class)"]),
        (["fa2", "--examples", "0"], ["--examples: 0 is too small"]),
        (["fa2", "--examples", "many"], ["--examples: 'many' is not a whole number"]),
        (
            ["fa9", "--seed", "-1"],
            ["--seed: -1 is too small", "unknown schedule 'fa9', did you mean 'fa3'? "
             "(allowed: standard, fa2, fa3, path/to/file.py:Class)"],
        ),
        (
            ["fa2", "--mutants", "--seed", "3"],
            ["--seed does not go with --mutants, which tries the same examples for every schedule"],
        ),
        (["nowhere.py:FA2"], ["schedule file nowhere.py does not exist"]),
    ],
)  # fmt: skip
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines() == [f"error: {line}" for line in lines]
