"""What commands share: options, printing, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flashsim.cli.app import INTERRUPTED, complain
from flashsim.errors import InputError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import TextIO

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys.")]
Output = Annotated[str | None, typer.Option("--output", metavar="FILE", help="Write the JSON to FILE too.")]


def number_option(*names: str, help: str) -> Any:
    """An option that stays text here, so that a file's checks and messages are the command line's too."""
    return typer.Option(*names, metavar="N", help=help)


def write_json(value: object) -> None:
    from flashsim.io.output import json_text

    sys.stdout.write(json_text(value))


def show(*parts: Any) -> None:
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


def output_file(path: str | None) -> AbstractContextManager[TextIO | None]:
    if path is None:
        return nullcontext()
    from flashsim.io.output import whole_file

    return whole_file(path)


def collect(results: Iterator[T], total: int, what: str) -> tuple[list[T], bool]:
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
def progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A function that moves a progress bar on by one; on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def say_interrupted(finished: int, total: int) -> int:
    return complain([f"interrupted after {finished} of {total}"], INTERRUPTED)


def all_or_problems(problems: list[str], *steps: Callable[[], Any]) -> list[Any]:
    """What each step returns; the mistakes of all of them are added to *problems*."""
    results = []
    for step in steps:
        try:
            results.append(step())
        except InputError as error:
            problems += error.problems
            results.append(None)
    return results
