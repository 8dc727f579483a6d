"""`flashsim run`, `simulate` and `accuracy`."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashsim.cli.app import FAILED, INTERRUPTED, OK, app, complain
from flashsim.cli.show import (
    Json,
    Output,
    all_or_problems,
    collect,
    number_option,
    output_file,
    say_interrupted,
    show,
    write_json,
)
from flashsim.errors import InputError, SimulationError

if TYPE_CHECKING:
    from flashsim.devices import DeviceSpec
    from flashsim.io.case import Case


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A scenario file or a file of claims (TOML).")],
    as_json: Json = False,
    output: Output = None,
) -> int:
    """Simulate the cases of a scenario, or run its experiment, beside what was measured, or hold claims against it."""
    from flashsim.io.claims import is_claims
    from flashsim.io.experiment import is_experiment

    if is_experiment(scenario):
        return _run_experiment(scenario, as_json, output)
    if is_claims(scenario):
        return _run_claims(scenario, as_json, output)
    from flashsim.analysis.run import published_beside, raise_refused, run_cases
    from flashsim.io.output import json_text
    from flashsim.io.scenario import read_scenario

    cases = read_scenario(scenario)
    with output_file(output) as file:
        outcomes, interrupted = collect(run_cases(cases, os.cpu_count() or 1), len(cases.cases), "simulating")
        if not interrupted:
            raise_refused(cases, outcomes)
        report = {
            "scenario": cases.path,
            "title": cases.title,
            "complete": not interrupted,
            "cases": [outcome.to_json() for outcome in outcomes],
            "published": [beside.to_json() for beside in published_beside(cases, outcomes)],
        }
        if file is not None:
            file.write(json_text(report))
    if as_json:
        write_json(report)
    else:
        from flashsim.analysis.tables import run_footer, run_tables

        show(*filter(None, [cases.title]), *run_tables(cases, outcomes), *run_footer(cases, outcomes))
    failures = [f"{outcome.case.label}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    return _exit_code(failures, interrupted, len(outcomes), len(cases.cases))


def _run_experiment(path: str, as_json: bool, output: str | None) -> int:
    from flashsim.analysis.fp8_error import seed_errors, summarize
    from flashsim.io.experiment import read_experiment
    from flashsim.io.output import json_text

    scenario = read_experiment(path)
    experiment = scenario.experiment
    with output_file(output) as file:
        found, interrupted = collect(seed_errors(experiment), experiment.seeds, "computing")
        errors = summarize(scenario, found)
        report = {
            "scenario": scenario.path,
            "title": scenario.title,
            "complete": not interrupted,
            "fp8_error": experiment.model_dump(),
            "variants": [error.to_json() for error in errors],
        }
        if file is not None:
            file.write(json_text(report))
    if as_json:
        write_json(report)
    else:
        from flashsim.analysis.tables import fp8_error_parts

        show(*filter(None, [scenario.title]), *fp8_error_parts(experiment, errors))
    return say_interrupted(len(found), experiment.seeds) if interrupted else OK


def _run_claims(path: str, as_json: bool, output: str | None) -> int:
    from flashsim.analysis.claims import jobs_of, judge, raise_refused, run_jobs
    from flashsim.io.claims import read_claims
    from flashsim.io.output import json_text

    claims = read_claims(path)
    jobs = jobs_of(claims.claims)
    with output_file(output) as file:
        found, interrupted = collect(run_jobs(jobs, os.cpu_count() or 1), len(jobs), "simulating")
        verdicts = judge(claims.claims, dict(found))
        raise_refused(claims, verdicts)
        report = {
            "scenario": claims.path,
            "title": claims.title,
            "complete": not interrupted,
            "claims": [verdict.to_json() for verdict in verdicts],
        }
        if file is not None:
            file.write(json_text(report))
    if as_json:
        write_json(report)
    else:
        from flashsim.analysis.tables import claims_parts

        show(*filter(None, [claims.title]), *claims_parts(verdicts))
    failures = [f"{verdict.claim.claim}: {verdict.failure}" for verdict in verdicts if verdict.failure]
    return _exit_code(failures, interrupted, len(found), len(jobs))


def _exit_code(failures: list[str], interrupted: bool, finished: int, total: int) -> int:
    """Say what failed, and how far an interrupted command came."""
    complain(failures, FAILED)
    if interrupted:
        return say_interrupted(finished, total)
    return FAILED if failures else OK


@app.command()
def simulate(
    gpu: Annotated[str, typer.Option(metavar="NAME|FILE", help="See `flashsim gpus`.")] = "h100-sxm5",
    schedule: Annotated[str, typer.Option(metavar="NAME|FILE", help="See `flashsim schedules`.")] = "fa3",
    batch: Annotated[str | None, number_option("--batch", help="Sequences.")] = None,
    heads: Annotated[str | None, number_option("--heads", help="Query heads.")] = None,
    kv_heads: Annotated[str | None, number_option("--kv-heads", help="KV heads; as many as query heads.")] = None,
    seqlen: Annotated[str | None, number_option("--seqlen", help="Queries of a sequence.")] = None,
    seqlen_k: Annotated[str | None, number_option("--seqlen-k", help="Keys of a sequence; as many as queries.")] = None,
    head_dim: Annotated[str | None, number_option("--head-dim", help="Of Q and K.")] = None,
    head_dim_v: Annotated[str | None, number_option("--head-dim-v", help="Of V; as of K.")] = None,
    mask: Annotated[str, typer.Option(metavar="MASK", help="As `flashsim schedules` lists them.")] = "full",
    dropout: Annotated[str | None, number_option("--dropout", help="Probability.")] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="fp16, bf16 or fp8.")] = "fp16",
    direction: Annotated[str, typer.Option(metavar="DIRECTION", help="fwd, bwd or fwd+bwd.")] = "fwd",
    clock_mhz: Annotated[str | None, number_option("--clock-mhz", help="SM clock; the GPU's default.")] = None,
    switches: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A switch of the schedule; repeatable.")
    ] = None,
    functional: Annotated[
        bool, typer.Option("--functional", help="Compute too; exit 1 if the result is wrong.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Simulate every SM and every CTA.")] = False,
    seed: Annotated[str, number_option("--seed", help="Of the random inputs of --functional.")] = "0",
    costs: Annotated[
        str | None,
        typer.Option("--costs", metavar="FILE", help="Counts of a compiled kernel, of `audit --as-costs`."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Simulate one case."""
    from flashsim.io.case import CaseBuilder, check_fields, read_switches
    from flashsim.io.fields import whole_number
    from flashsim.simulate import simulate

    def option(key: str) -> str:
        return "--" + key.replace("_", "-") if key else ""

    given: dict[str, Any] = {
        "gpu": gpu,
        "schedule": schedule,
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "seqlen": seqlen,
        "seqlen_k": seqlen_k,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "mask": mask,
        "dropout": dropout,
        "dtype": dtype,
        "direction": direction,
        "clock_mhz": clock_mhz,
    }
    given = {key: value for key, value in given.items() if value is not None}
    given["set"], problems = read_switches(switches or (), "--set")
    values, lines, bad = check_fields(given, option, text=True)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what a schedule file prints is no JSON
        case, more = CaseBuilder().build(values, option, bad)
    problems += lines + more
    number = 0
    try:
        number = whole_number(seed, text=True)
        if number < 0:
            problems.append(f"--seed: {number} is negative")
    except ValueError as error:
        problems.append(f"--seed: {error}")
    if problems or case is None:
        raise InputError(problems)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = simulate(
                case.problem,
                case.schedule,
                case.gpu if costs is None else _with_costs(case, costs),
                clock_mhz=case.clock_mhz,
                options=case.options,
                functional=functional,
                full=full,
                seed=number,
            )
    except KeyboardInterrupt:
        return complain(["interrupted"], INTERRUPTED)
    except SimulationError as error:
        if as_json and functional:
            blank = dict.fromkeys(("max_abs_error", "mean_abs_error", "lse_max_abs_error"))
            hazards = [f"{type(error).__name__}: {error}"]
            report = {"schedule": schedule, "gpu": gpu, "functional": {**blank, "accepted": False, "hazards": hazards}}
            write_json(report)
        raise
    if as_json:
        write_json(result.to_json())
    else:
        from flashsim.analysis.tables import functional_lines, kernels_table, verdict

        show(*verdict(result), "", kernels_table(result), *functional_lines(result))
    return FAILED if result.functional is not None and not result.functional.accepted else OK


def _with_costs(case: Case, path: str) -> DeviceSpec:
    """The case's GPU with the instruction counts of a compiled kernel. Raises InputError if it is not the case's."""
    from flashsim.io.costs import fitting, read_costs
    from flashsim.simulate import configured

    costs = read_costs(path)
    options = configured(case.schedule, case.problem, case.gpu, case.options).options()
    try:
        return fitting(costs, case.schedule.name(), options, case.problem).applied(case.gpu)
    except InputError as error:
        raise InputError([f"--costs {path}: {line}" for line in error.problems]) from None


@app.command()
def accuracy(
    measured: Annotated[str, typer.Argument(metavar="MEASURED.csv", help="Measured rows.")],
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN,...", help="Group by columns: schedule,direction,head_dim,mask")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> int:
    """Predict measured times and report the errors."""
    from flashsim.analysis.accuracy import check_columns, predict, sessions_beside, summarize
    from flashsim.io.measured import read_measured
    from flashsim.io.output import json_text

    columns = [name.strip() for name in by.split(",")] if by is not None else []
    problems: list[str] = []
    rows, sessions = all_or_problems(
        problems, lambda: read_measured(measured), lambda: sessions_beside(measured), lambda: check_columns(columns)
    )[:2]
    if problems:
        raise InputError(problems)
    with output_file(output) as file:
        outcomes, interrupted = collect(predict(rows, sessions, os.cpu_count() or 1), len(rows), "predicting")
        report = summarize(rows, outcomes, columns)
        if file is not None:
            file.write(json_text(report.to_json()))
    if as_json:
        write_json(report.to_json())
    else:
        from flashsim.analysis.tables import accuracy_lines, accuracy_table

        show(accuracy_table(report), *accuracy_lines(report))
    return say_interrupted(len(outcomes), len(rows)) if interrupted else OK
