"""Every exception that flashsim raises on purpose. The command line maps `InputError` to exit code 2, the rest to 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FlashsimError(Exception):
    """Base of all."""


class InputError(FlashsimError):
    """What the user gave cannot be used. `problems` holds one line per mistake; all of them are found at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class Infeasible(InputError):
    """The schedule does not fit the device: shared memory, registers, or an instruction the device does not have."""


class SimulationError(FlashsimError):
    """A simulated kernel went wrong; the message names the parties, the slot and the times.

    `memory` is the `engine.Memory` that it is about, if it is about one.
    """

    def __init__(self, message: str, memory: object = None) -> None:
        super().__init__(message)
        self.memory = memory


class EndlessRun(SimulationError):
    """A simulated kernel took more events, or one of its steps more seconds, than any that ends."""


class Race(SimulationError):
    """Two accesses to one slot, one of them a write, that no chain of signals and waits orders."""


class Hazard(SimulationError):
    """A slot or barrier was misused: read while empty, overwritten while full, lapped, or left behind at the end."""


class Deadlock(SimulationError):
    """Nothing can happen any more, and somebody still waits."""


def unknown(kind: str, given: object, allowed: Iterable[object]) -> str:
    """One line that says what was given, what is nearest to it, and what is allowed."""
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(given).lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    hint = next((f", did you mean {n!r}?" for n in names if near and n.lower() == near[0]), "")
    return f"unknown {kind} {str(given)!r}{hint} (allowed: {', '.join(names) or 'none'})"


def line_of(error: BaseException, within: str | None = None) -> str | None:
    """`file:line` of the innermost statement that `error` came through; of the innermost one in the file `within`.

    None if it came through no statement of that file.
    """
    trace, found = error.__traceback__, None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if within in (None, file):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
