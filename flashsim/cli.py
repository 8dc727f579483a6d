"""The command line: parse, call, print. Everything heavy is imported by the command that needs it.

Exit codes: 0 done, 1 the thing asked about failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flashsim.errors import FlashsimError, InputError, SimulationError, unknown

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import TextIO

T = TypeVar("T")
OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Newer versions of typer carry their own copy of click, older ones import it; the base class is the same in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="How fast an attention schedule runs on a GPU, which unit binds it, and whether its barriers are right.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys.")]
Output = Annotated[str | None, typer.Option("--output", metavar="FILE", help="Write the JSON to FILE too.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code. Nothing that the user can cause ends in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A source with a sign that the terminal's encoding lacks must not end the program.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        command = typer.main.get_command(app)
        code = command.main(args=argv, prog_name="flashsim", standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        return _complain((" ".join(line.split()) for line in error.problems), BAD_INPUT)
    except _UsageError as error:
        return _complain([_usage(error)], BAD_INPUT)
    except SimulationError as error:
        notes = getattr(error, "__notes__", [])
        return _complain([f"{type(error).__name__}: {error}", *notes], FAILED)
    except FlashsimError as error:
        return _complain([str(error)], FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(["interrupted"], INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else OK


def _complain(lines: Iterable[str], code: int) -> int:
    for line in lines:
        sys.stderr.write(f"error: {line}\n")
    return code


def _usage(error: Exception) -> str:
    """A usage error in one line, with the nearest name."""
    context: Any = getattr(error, "ctx", None)
    if context is not None and type(error).__name__ == "NoSuchOption":
        names = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return unknown("option", getattr(error, "option_name", ""), [*names, "--help"])
    message = str(getattr(error, "format_message", lambda: error)())
    if context is not None and (command := re.match(r"No such command '(.*?)'", message)):
        return unknown("command", command[1], context.command.commands)
    return " ".join(message.split())


def _write_json(value: object) -> None:
    from flashsim.io.output import json_text

    sys.stdout.write(json_text(value))


def _show(*parts: Any) -> None:
    """Lines and tables. On a terminal tables fill its width, in a pipe they are as wide as their text."""
    from rich.console import Console

    def console_of(width: int | None) -> Console:
        return Console(width=width, markup=False, emoji=False, highlight=False)

    unlimited = console_of(10_000)
    terminal = console_of(None) if sys.stdout.isatty() else unlimited
    for part in parts:
        # A table of which no column may be wrapped is better broken by the terminal than cut.
        rigid = not isinstance(part, str) and all(column.no_wrap for column in part.columns)
        console = unlimited if rigid else terminal
        with console.capture() as text:
            console.print(part, soft_wrap=isinstance(part, str))
        sys.stdout.writelines(line.rstrip() + "\n" for line in text.get().splitlines() or [""])


def _output(path: str | None) -> AbstractContextManager[TextIO | None]:
    if path is None:
        return nullcontext()
    from flashsim.io.output import whole_file

    return whole_file(path)


def _collect(results: Iterator[T], total: int, what: str) -> tuple[list[T], bool]:
    """All *results*, with a progress bar on a terminal; on Ctrl-C those that were finished, and True."""
    finished: list[T] = []
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        results = iter(track(results, what, total, console=Console(stderr=True), transient=True))
    try:
        for result in results:
            finished.append(result)
    except KeyboardInterrupt:
        return finished, True
    return finished, False


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A function that moves a progress bar on by one; on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _interrupted(finished: int, total: int) -> int:
    return _complain([f"interrupted after {finished} of {total}"], INTERRUPTED)


@app.callback()
def _flashsim(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from flashsim import __version__

        typer.echo(f"flashsim {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A scenario file (TOML).")],
    as_json: Json = False,
    output: Output = None,
) -> int:
    """Simulate the cases of a scenario, beside what was measured."""
    from flashsim.analysis.run import published_beside, raise_refused, run_cases
    from flashsim.io.output import json_text
    from flashsim.io.scenario import read_scenario

    cases = read_scenario(scenario)
    with _output(output) as file:
        outcomes, interrupted = _collect(run_cases(cases, os.cpu_count() or 1), len(cases.cases), "simulating")
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
        _write_json(report)
    else:
        from flashsim.analysis.tables import run_footer, run_tables

        _show(*filter(None, [cases.title]), *run_tables(cases, outcomes), *run_footer(cases, outcomes))
    failures = [f"{outcome.case.label}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    _complain(failures, FAILED)
    if interrupted:
        return _interrupted(len(outcomes), len(cases.cases))
    return FAILED if failures else OK


def _number_option(*names: str, help: str) -> Any:
    """An option that stays text here, so that a file's checks and messages are the command line's too."""
    return typer.Option(*names, metavar="N", help=help)


@app.command()
def simulate(
    gpu: Annotated[str, typer.Option(metavar="NAME|FILE", help="See `flashsim gpus`.")] = "h100-sxm5",
    schedule: Annotated[str, typer.Option(metavar="NAME|FILE", help="See `flashsim schedules`.")] = "fa3",
    batch: Annotated[str | None, _number_option("--batch", help="Sequences.")] = None,
    heads: Annotated[str | None, _number_option("--heads", help="Query heads.")] = None,
    kv_heads: Annotated[str | None, _number_option("--kv-heads", help="KV heads; as many as query heads.")] = None,
    seqlen: Annotated[str | None, _number_option("--seqlen", help="Queries of a sequence.")] = None,
    seqlen_k: Annotated[
        str | None, _number_option("--seqlen-k", help="Keys of a sequence; as many as queries.")
    ] = None,
    head_dim: Annotated[str | None, _number_option("--head-dim", help="Of Q and K.")] = None,
    head_dim_v: Annotated[str | None, _number_option("--head-dim-v", help="Of V; as of K.")] = None,
    mask: Annotated[str, typer.Option(metavar="MASK", help="full or causal.")] = "full",
    dropout: Annotated[str | None, _number_option("--dropout", help="Probability.")] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="fp16 or bf16.")] = "fp16",
    direction: Annotated[str, typer.Option(metavar="DIRECTION", help="fwd.")] = "fwd",
    clock_mhz: Annotated[str | None, _number_option("--clock-mhz", help="SM clock; the GPU's default.")] = None,
    switches: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A switch of the schedule; repeatable.")
    ] = None,
    functional: Annotated[
        bool, typer.Option("--functional", help="Compute too; exit 1 if the result is wrong.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Simulate every SM and every CTA.")] = False,
    seed: Annotated[str, _number_option("--seed", help="Of the random inputs of --functional.")] = "0",
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
        result = simulate(
            case.problem,
            case.schedule,
            case.gpu,
            clock_mhz=case.clock_mhz,
            options=case.options,
            functional=functional,
            full=full,
            seed=number,
        )
    except SimulationError as error:
        if as_json and functional:
            blank = dict.fromkeys(("max_abs_error", "mean_abs_error", "lse_max_abs_error"))
            hazards = [f"{type(error).__name__}: {error}"]
            report = {"schedule": schedule, "gpu": gpu, "functional": {**blank, "accepted": False, "hazards": hazards}}
            _write_json(report)
        raise
    if as_json:
        _write_json(result.to_json())
    else:
        from flashsim.analysis.tables import functional_lines, kernels_table, verdict

        _show(*verdict(result), "", kernels_table(result), *functional_lines(result))
    return FAILED if result.functional is not None and not result.functional.accepted else OK


@app.command()
def check(
    schedule: Annotated[str, typer.Argument(metavar="[NAME|FILE.py:CLASS|all]", help="What to check.")] = "all",
    examples: Annotated[str | None, _number_option("--examples", help="Examples to draw; 200.")] = None,
    seed: Annotated[str | None, _number_option("--seed", help="Of the draws; 0.")] = None,
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
    _all_or_problems(problems, *(lambda name=name: load_schedule(name) for name in names))
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
        with _progress(examples, f"checking {name}") as advance:
            reports.append(check(name, examples, seed, advance))
        if not as_json:
            _show(*report_lines(reports[-1]))
    passed = all(report.passed for report in reports)
    if as_json:
        _write_json({"passed": passed, "checks": [report.to_json() for report in reports]})
    return passed


def _survey(names: list[str], as_json: bool) -> bool:
    from flashsim.check.survey import Survey, mutants_in, survey
    from flashsim.check.words import survey_line, survey_table

    surveys = []
    for name in names:
        verdicts, interrupted = _collect(survey(name), len(mutants_in(name)), f"mutants of {name}")
        surveys.append(Survey(name, tuple(verdicts)))
        if not as_json:
            _show(survey_table(surveys[-1]), "", survey_line(surveys[-1]), "")
        if interrupted:
            raise KeyboardInterrupt
    passed = all(survey.passed for survey in surveys)
    if as_json:
        _write_json({"passed": passed, "surveys": [survey.to_json() for survey in surveys]})
    return passed


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
    rows, sessions = _all_or_problems(
        problems, lambda: read_measured(measured), lambda: sessions_beside(measured), lambda: check_columns(columns)
    )[:2]
    if problems:
        raise InputError(problems)
    with _output(output) as file:
        outcomes, interrupted = _collect(predict(rows, sessions, os.cpu_count() or 1), len(rows), "predicting")
        report = summarize(rows, outcomes, columns)
        if file is not None:
            file.write(json_text(report.to_json()))
    if as_json:
        _write_json(report.to_json())
    else:
        from flashsim.analysis.tables import accuracy_lines, accuracy_table

        _show(accuracy_table(report), *accuracy_lines(report))
    return _interrupted(len(outcomes), len(rows)) if interrupted else OK


def _all_or_problems(problems: list[str], *steps: Callable[[], Any]) -> list[Any]:
    """What each step returns; the mistakes of all of them are added to *problems*."""
    results = []
    for step in steps:
        try:
            results.append(step())
        except InputError as error:
            problems += error.problems
            results.append(None)
    return results


@app.command()
def gpus(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print every number of this one.")] = None,
    as_json: Json = False,
) -> int:
    """List the GPUs, or print every number of one with its source."""
    from flashsim.devices import device_names, load_device

    specs = [load_device(known) for known in (device_names() if name is None else [name])]
    about = [
        {key: getattr(spec, key) for key in ("name", "title", "architecture", "compute_capability", "device_hash")}
        for spec in specs
    ]
    if as_json and name is None:
        _write_json({"gpus": about})
    elif as_json:
        numbers = {key: dict(vars(cited)) for key, cited in specs[0].citations.items()}
        _write_json({**about[0], "numbers": numbers})
    else:
        from flashsim.analysis.tables import gpu_table, gpus_table

        if name is None:
            _show(gpus_table(specs))
        else:
            _show(f"{specs[0].name}: {specs[0].title}, {specs[0].architecture}", gpu_table(specs[0]))
    return OK


@app.command()
def schedules(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print the switches of this one.")] = None,
    as_json: Json = False,
) -> int:
    """List the schedules, or print the switches of one."""
    from flashsim.schedules import load_schedule, schedule_names

    classes = [load_schedule(known) for known in (schedule_names() if name is None else [name])]
    about = [
        {"name": schedule.name()}
        | {key: getattr(schedule, key) for key in ("title", "source", "architectures", "masks", "dtypes", "directions")}
        for schedule in classes
    ]
    if as_json and name is None:
        _write_json({"schedules": about})
    elif as_json:
        _write_json({**about[0], "switches": [_switch(switch) for switch in classes[0].switches()]})
    else:
        from flashsim.analysis.tables import schedules_table, switches_table

        if name is None:
            _show(schedules_table(classes))
        else:
            _show(
                f"{about[0]['name']}: {about[0]['title']}", f"source: {about[0]['source']}", switches_table(classes[0])
            )
    return OK


def _switch(switch: Any) -> dict[str, Any]:
    keys = {"name": "name", "type": "type_name", "default": "default", "choices": "choices", "help": "help"}
    return {key: getattr(switch, attribute) for key, attribute in keys.items()}
