"""The program: its options, its exit codes, and how errors are told."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from flashsim.errors import FlashsimError, InputError, SimulationError, unknown

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
        return complain((" ".join(line.split()) for line in error.problems), BAD_INPUT)
    except _UsageError as error:
        return complain([_usage(error)], BAD_INPUT)
    except SimulationError as error:
        notes = getattr(error, "__notes__", [])
        return complain([f"{type(error).__name__}: {error}", *notes], FAILED)
    except FlashsimError as error:
        return complain([str(error)], FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return complain(["interrupted"], INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else OK


def complain(lines: Iterable[str], code: int) -> int:
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
