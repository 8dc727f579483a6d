"""`flashsim check`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flashsim.cli.app import FAILED, OK, app
from flashsim.cli.show import Json, all_or_problems, collect, number_option, progress, show, write_json
from flashsim.errors import InputError


@app.command()
def check(
    schedule: Annotated[str, typer.Argument(metavar="[NAME|FILE.py:CLASS|all]", help="What to check.")] = "all",
    examples: Annotated[str | None, number_option("--examples", help="Examples to draw; 200.")] = None,
    seed: Annotated[str | None, number_option("--seed", help="Of the draws; 0.")] = None,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Take away or move each wait and signal: would a run notice?")
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
    all_or_problems(problems, *(lambda name=name: load_schedule(name) for name in names))
    if problems:
        raise InputError(problems)
    # Small products are quicker on one thread; must be set before numpy loads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    passed = _survey(names, as_json) if mutants else _check(names, numbers["--examples"], numbers["--seed"], as_json)
    return OK if passed else FAILED


def _check(names: list[str], examples: int, seed: int, as_json: bool) -> bool:
    from flashsim.check.prove import check
    from flashsim.check.words import report_lines

    reports = []
    for name in names:
        with progress(examples, f"checking {name}") as advance:
            reports.append(check(name, examples, seed, advance))
        if not as_json:
            show(*report_lines(reports[-1]))
    passed = all(report.passed for report in reports)
    if as_json:
        write_json({"passed": passed, "checks": [report.to_json() for report in reports]})
    return passed


def _survey(names: list[str], as_json: bool) -> bool:
    from flashsim.check.survey import Survey, mutants_in, survey
    from flashsim.check.words import survey_line, survey_table

    surveys = []
    for name in names:
        verdicts, interrupted = collect(survey(name), len(mutants_in(name)), f"mutants of {name}")
        surveys.append(Survey(name, tuple(verdicts)))
        if not as_json:
            show(survey_table(surveys[-1]), "", survey_line(surveys[-1]), "")
        if interrupted:
            raise KeyboardInterrupt
    passed = all(survey.passed for survey in surveys)
    if as_json:
        write_json({"passed": passed, "surveys": [survey.to_json() for survey in surveys]})
    return passed
