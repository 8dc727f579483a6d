"""`flashsim check`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from flashsim.cli.app import FAILED, INTERRUPTED, OK, app, complain
from flashsim.cli.show import (
    Json,
    all_or_problems,
    collect,
    number_option,
    progress,
    say_interrupted,
    show,
    write_json,
)
from flashsim.errors import InputError

if TYPE_CHECKING:
    from flashsim.check.prove import Report
    from flashsim.check.survey import Survey


@app.command()
def check(
    schedule: Annotated[str, typer.Argument(metavar="[NAME|FILE.py:CLASS|all]", help="What to check.")] = "all",
    examples: Annotated[str | None, number_option("--examples", help="Examples to draw; 200.")] = None,
    seed: Annotated[str | None, number_option("--seed", help="Of the draws; 0.")] = None,
    mutants: Annotated[
        bool,
        typer.Option(
            "--mutants",
            help="Take away or move each wait and signal: would a run notice? "
            "A comment `# equivalent: REASON` on a statement's line says why it need not.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Is a schedule exact, and free of races and deadlock? Exit 1 with the smallest problem on which it is not."""
    from flashsim.io.fields import whole_number
    from flashsim.schedules import load_schedule, schedule_names

    problems, numbers = [], {"--examples": 200, "--seed": 0}
    for name, given in (("--examples", examples), ("--seed", seed)):
        try:
            numbers[name] = numbers[name] if given is None else whole_number(given, text=True)
            if numbers[name] < (1 if name == "--examples" else 0):
                problems.append(f"{name}: {numbers[name]} is too small")
            if given is not None and mutants:
                problems.append(f"{name} does not go with --mutants, which tries the same examples for every schedule")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    names = list(schedule_names()) if schedule == "all" else [schedule]
    # Small products are quicker on one thread; must be set before numpy loads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    found, interrupted = _Found(), False
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what a schedule file prints is no JSON
            all_or_problems(problems, *(lambda name=name: load_schedule(name) for name in names))
            if problems:
                raise InputError(problems)
            if mutants:
                _survey(names, found, as_json)
            else:
                _check(names, numbers["--examples"], numbers["--seed"], found, as_json)
    except KeyboardInterrupt:
        interrupted = True
    passed = not interrupted and all(one.passed for one in found.reports)
    if as_json:
        reports = [one.to_json() for one in found.reports]
        write_json({"passed": passed, "complete": not interrupted, "surveys" if mutants else "checks": reports})
    if interrupted:
        return say_interrupted(found.finished, found.total) if found.total else complain(["interrupted"], INTERRUPTED)
    return OK if passed else FAILED


@dataclass
class _Found:
    """How far a command has come."""

    reports: list[Report | Survey] = field(default_factory=list)
    finished: int = 0
    """Examples, or mutants."""
    total: int = 0


def _check(names: list[str], examples: int, seed: int, found: _Found, as_json: bool) -> None:
    from flashsim.check.prove import check
    from flashsim.check.words import report_lines

    found.total = examples * len(names)
    for count, name in enumerate(names, start=1):
        with progress(examples, f"checking {name}") as advance:

            def one_more(advance: Callable[[], None] = advance) -> None:
                found.finished += 1
                advance()

            report = check(name, examples, seed, one_more)
        found.reports.append(report)
        found.finished = count * examples
        if not as_json:
            show(*report_lines(report))


def _survey(names: list[str], found: _Found, as_json: bool) -> None:
    from flashsim.check.survey import Survey, mutants_in, survey
    from flashsim.check.words import survey_lines, survey_table

    counts = [len(mutants_in(name)) for name in names]
    found.total = sum(counts)
    for name, count in zip(names, counts, strict=True):
        verdicts, interrupted = collect(survey(name), count, f"mutants of {name}")
        report = Survey(name, tuple(verdicts), complete=not interrupted)
        found.reports.append(report)
        found.finished += len(verdicts)
        if not as_json:
            show(survey_table(report), "", *survey_lines(report), "")
        if interrupted:
            raise KeyboardInterrupt
