"""`flashsim check` on the command line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashsim import schedules
from flashsim.check import survey
from flashsim.check.example import Example
from flashsim.cli import main
from flashsim.schedules import schedule_names

ROOT = Path(__file__).parents[2]
NAMES = ", ".join(schedule_names())
LOOP = "        for tile in wg.tiles():\n"


@pytest.fixture(autouse=True)
def fewer_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than `flashsim check --mutants` takes."""
    monkeypatch.setattr(survey, "DRAWN", 100)
    monkeypatch.setattr(survey, "KEPT", 20)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written(path: Path, name: str, old: str, new: str) -> Path:
    """The file `path` with the text of the built-in schedule `name`, `old` in it replaced by `new`."""
    text = (Path(schedules.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """fa2 that does not wait for V."""
    path = written(tmp_path / "wrong.py", "fa2", "                yield v\n", "                pass\n")
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
        "complete": True,
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
    monkeypatch.setattr(survey, "TRIED", 8)
    monkeypatch.setattr(survey, "in_order", lambda work, items, workers: map(work, items))
    code, out, err = run(capsys, "standard", "--mutants")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "standard"
    assert lines[1].split() == ["file", "line", "function", "statement", "change", "outcome", "by,", "or", "why"]
    assert lines[-2] == "standard: 30 mutants: 21 killed, 9 equivalent"


def test_json_of_mutants(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A survivor without a reason is a failure."""
    path = written(tmp_path / "mine.py", "fa2", "class FA2(", "class Mine(")
    monkeypatch.setattr(survey, "TRIED", 4)
    monkeypatch.setattr(survey, "in_order", lambda work, items, workers: map(work, items))
    code, out, _ = run(capsys, f"{path}:Mine", "--mutants", "--json")
    report: dict[str, Any] = json.loads(out)
    assert code == 1
    assert report.keys() == {"passed", "complete", "surveys"}
    assert not report["passed"]
    assert report["complete"]
    (found,) = report["surveys"]
    counts = found["counts"]
    assert counts.keys() == {"killed", "equivalent", "invalid", "not run", "survived"}
    assert sum(counts.values()) == len(found["mutants"]) == 15
    # So few examples notice some, and not all; the reasons of fa2 are not those of a class of another name.
    assert counts["killed"] > 0
    assert counts["survived"] > 0
    assert counts["invalid"] == counts["not run"] == 0
    assert found["mutants"][0].keys() == {"file", "function", "line", "statement", "change", "outcome", "how", "runs"}


def test_the_replay_command_survives_a_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Spaces and quotes in a path; the pasted command runs and says the same."""
    path = written(tmp_path / 'it\'s "my" $HOME.py', "fa2", "                yield v\n", "")
    code, out, _ = run(capsys, f"{path}:FA2", "--examples", "9")
    assert code == 1
    command = out.splitlines()[-1].removeprefix("replay: ")
    assert shlex.split(command)[:3] == ["flashsim", "check", f"{path}:FA2"]
    assert run(capsys, *shlex.split(command)[2:]) == (1, out, "")


# What the user's file prints.


@pytest.fixture
def noisy(tmp_path: Path) -> str:
    """fa2 that prints when it is loaded and when it runs."""
    path = written(tmp_path / "noisy.py", "fa2", LOOP, f"        print('running')\n{LOOP}")
    path.write_text(path.read_text(encoding="utf-8") + "print('imported')\n", encoding="utf-8")
    return f"{path}:FA2"


@pytest.mark.parametrize("options", [["--examples", "2"], ["--mutants"]])
def test_what_a_schedule_prints_is_no_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, noisy: str, options: list[str]
) -> None:
    """Neither here nor in the processes that judge the mutants."""
    monkeypatch.setattr(survey, "TRIED", 2)
    code = main(["check", noisy, *options, "--json"])
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["complete"]
    assert code == (0 if report["passed"] else 1)
    assert "imported" in err
    assert "running" in err


def test_what_a_schedule_prints_is_no_json_of_simulate(capsys: pytest.CaptureFixture[str], noisy: str) -> None:
    options = ["--schedule", noisy, "--batch", "1", "--heads", "1", "--seqlen", "128", "--head-dim", "64"]
    assert main(["simulate", *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["schedule"]
    assert set(captured.err.splitlines()) == {"imported", "running"}
    assert main(["simulate", *options]) == 0
    assert "running" in capsys.readouterr().out


# Ctrl-C.


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_what_was_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """In the third example of the second schedule."""
    names = schedule_names()
    checks, honest = [], Example.check

    def interrupted(example: Example) -> None:
        checks.append(example)
        if len(checks) == 4 + 3:
            raise KeyboardInterrupt
        honest(example)

    monkeypatch.setattr(Example, "check", interrupted)
    code, out, err = run(capsys, "--examples", "4", *["--json"] * as_json)
    assert (code, err) == (130, f"error: interrupted after 6 of {4 * len(names)}\n")
    if as_json:
        report = json.loads(out)
        assert (report["passed"], report["complete"]) == (False, False)
        assert [(check["schedule"], check["passed"]) for check in report["checks"]] == [(names[0], True)]
    else:
        assert out == f"{names[0]}: 4 examples, seed 0: exact, and without race, hazard or deadlock\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_among_mutants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def three(work: object, items: list[tuple[str, int]], workers: int) -> Iterator[survey.Verdict]:
        for _, number in items[:3]:
            yield survey.Verdict("mine.py", "program", number, "yield q", "removed", survey.KILLED, "Race", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(survey, "in_order", three)
    code, out, err = run(capsys, "standard", "--mutants", *["--json"] * as_json)
    assert (code, err) == (130, f"error: interrupted after 3 of {len(survey.mutants_in('standard'))}\n")
    if as_json:
        report = json.loads(out)
        assert (report["passed"], report["complete"]) == (False, False)
        assert [(found["passed"], len(found["mutants"])) for found in report["surveys"]] == [(False, 3)]
    else:
        assert out.splitlines()[-2] == "standard: 3 mutants: 3 killed"


def test_ctrl_c_while_the_file_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    code, out, err = run(capsys, str(path), "--json")
    assert (code, err) == (130, "error: interrupted\n")
    assert json.loads(out) == {"passed": False, "complete": False, "checks": []}


IN_A_PROCESS = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from flashsim.check import survey; survey.DRAWN = 20; from flashsim.cli import main; sys.exit(main())"
)
"""A process that is started in the background may have been told to ignore interruptions."""

WAITS = """
def wait_for_the_test():
    import pathlib, time
    folder = pathlib.Path(__file__).parent
    (folder / "begun").touch()
    while not (folder / "enough").exists():
        time.sleep(0.01)
    raise RuntimeError("the test is over")
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
@pytest.mark.parametrize("options", [["--examples", "7"], ["--mutants"]])
def test_sigint(tmp_path: Path, options: list[str]) -> None:
    """The schedule says when it runs, and does not go on until it may; worker processes are not interrupted."""
    begun, enough = tmp_path / "begun", tmp_path / "enough"
    path = written(tmp_path / "mine.py", "fa2", LOOP, f"        wait_for_the_test()\n{LOOP}")
    path.write_text(path.read_text(encoding="utf-8") + WAITS, encoding="utf-8")
    command = [sys.executable, "-c", IN_A_PROCESS, "check", f"{path}:FA2", *options, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            until = time.monotonic() + 60
            while not begun.exists() and time.monotonic() < until:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            enough.touch()
            out, err = process.communicate(timeout=30)
        finally:
            enough.touch()
            process.kill()
    assert process.returncode == 130
    assert not json.loads(out)["complete"]
    total = 7 if "--examples" in options else len(survey.mutants_in(f"{path}:FA2"))
    assert err == f"error: interrupted after 0 of {total}\n"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["fa9"], [f"unknown schedule 'fa9', did you mean 'fa3'? (allowed: {NAMES}, path/to/file.py:Class)"]),
        (["fa2", "--examples", "0"], ["--examples: 0 is too small"]),
        (["fa2", "--examples", "many"], ["--examples: 'many' is not a whole number"]),
        (
            ["fa9", "--seed", "-1"],
            ["--seed: -1 is too small", "unknown schedule 'fa9', did you mean 'fa3'? "
             f"(allowed: {NAMES}, path/to/file.py:Class)"],
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
