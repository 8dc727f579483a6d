"""`flashsim validate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashsim.cli.app import FAILED, INTERRUPTED, OK, app, complain
from flashsim.cli.show import Json, number_option, show, write_json
from flashsim.errors import InputError

if TYPE_CHECKING:
    from flashsim.gpu.measurements import Measurement
    from flashsim.gpu.validation import Exactness, Validation


@app.command()
def validate(
    kernels: Annotated[list[str] | None, typer.Argument(metavar="KERNEL", help="Which kernels; all.")] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="auto|NAME|FILE", help="The device that predictions are made for.")
    ] = "auto",
    examples: Annotated[
        str | None,
        number_option(
            "--examples", help="Random problems for each kernel; 60 on a GPU, else 10; with --quick half of that."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FILE.csv", help="Write measured rows, and sessions.toml beside them."),
    ] = None,
    timelines: Annotated[
        str | None, typer.Option("--timelines", metavar="FOLDER", help="Write what happens inside a CTA of fa3.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer of everything: about five minutes on a GPU.")] = False,
    as_json: Json = False,
) -> int:
    """Are the kernels exact, how fast are they, and how far is that from the simulator? Without a GPU: exactness in the
    interpreter, and the audit. Exit 1 if a kernel is not exact, or an audit fails."""
    from flashsim.gpu.validate import prepare, run
    from flashsim.gpu.validation import Request

    count = _count(examples)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        validation = prepare(Request(tuple(kernels or ()), gpu, count, output, timelines, quick))
        interrupted = False
        try:
            run(validation, lambda finding: None if as_json else _say(finding))
        except KeyboardInterrupt:
            interrupted = True
    if as_json:
        write_json(validation.to_json())
    else:
        show(*_conclusion(validation))
    if interrupted:
        return complain(["interrupted; what was finished stands above"], INTERRUPTED)
    return OK if validation.passed else FAILED


def _count(given: str | None) -> int | None:
    from flashsim.io.fields import whole_number

    if given is None:
        return None
    try:
        count = whole_number(given, text=True)
    except ValueError as error:
        raise InputError(f"--examples: {error}") from None
    if count < 1:
        raise InputError(f"--examples: {count} is too small")
    return count


def _say(finding: Any) -> None:
    """At once: a run on a GPU may be ended before its end."""
    from flashsim.gpu.measurements import Measurement
    from flashsim.gpu.validation import Exactness

    if isinstance(finding, Exactness):
        show(*_exactness_lines(finding))
    elif isinstance(finding, Measurement):
        show(_measurement_line(finding))
    elif isinstance(finding, str):
        show(finding)
    else:
        show(*_audit_lines(finding))
    sys.stdout.flush()


def _exactness_lines(found: Exactness) -> Iterator[str]:
    from flashsim.gpu.exactness import PLACES

    tried = f"{found.examples} random problem{'s' * (found.examples != 1)} {PLACES[found.place]}"
    if found.failure is None:
        yield f"{found.kernel:<14}exact: {tried}"
        return
    yield f"{found.kernel:<14}FAILED: {tried}; {found.failure['kind']}"
    yield from (f"    {line}" for line in found.failure["message"].splitlines())
    if found.failure["trial"]:
        yield f"    {found.failure['trial']}"


def _audit_lines(report: Any) -> Iterator[str]:
    if not report.exists:
        yield f"{report.kernel:<14}does not exist for {report.target}"
        return
    yield f"{report.kernel:<14}audit on {report.target}: {'passed' if report.passed else 'FAILED'}"
    yield from (f"    {case.case.label}: {line}" for case in report.cases for line in case.problems)


def _measurement_line(m: Measurement) -> str:
    from flashsim.gpu.validation import words

    clock = f"  {m.state['sm_mhz']:.0f} MHz  {m.state['power_w']:.0f} W" if m.state else ""
    late = "  host-bound" if m.times.late else ""
    return (
        f"{words(m.problem):<40}{m.variant:<28}{m.times.time_us:>10.1f} us  warm {m.times.warm_time_us:>10.1f} us  "
        f"{m.tflops:>6.1f} TFLOP/s  spread {m.times.spread:>5.1%}{clock}{late}"
    )


def _conclusion(v: Validation) -> Iterator[str]:
    from flashsim.gpu.validation import words

    if v.predictions:
        yield ""
        yield f"{'':<40}{'':<28}{'measured':>13}{'predicted':>13}{'error':>8}"
    for m in v.measurements:
        beside = v.predictions.get(m.id)
        if beside is None:
            continue
        start = f"{words(m.problem):<40}{m.variant:<28}{m.times.time_us:>10.1f} us"
        if beside.time_us is None:
            yield f"{start}  {beside.refused}"
        else:
            yield f"{start}{beside.time_us:>10.1f} us{beside.time_us / m.times.time_us - 1:>+8.1%}"
    if v.figures:
        yield ""
    for figure in v.figures:
        compared = f"{figure['ours']} is {figure['speed']:.3f} times as fast as {figure['other']}"
        yield f"{words(figure['problem']):<40}{compared}"
    for path in v.timelines:
        yield f"timeline: {path}"
    for line in v.not_run:
        yield f"not run: {line}"
    failed = [one.kernel for one in v.exactness if not one.passed]
    failed += [f"{one.kernel} (audit)" for one in v.audits if not one.passed]
    if v.complete:
        yield f"failed: {', '.join(failed)}" if failed else "all that was run passed"
