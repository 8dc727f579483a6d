"""`check`: many drawn examples of one schedule, and the smallest that fails."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashsim.check.draw import NothingAccepted, architectures_of, dtypes_of, for_examples, impls_of, values_of
from flashsim.check.example import Example, Latencies
from flashsim.check.timeline import timeline
from flashsim.errors import InputError, SimulationError
from flashsim.machine.trace import Trace
from flashsim.schedules import load_schedule

EXAMPLES = 200
SHRINKING_S = 20.0
"""Seconds for which a smaller failing example is looked for."""
SLOW_S = 2.0
"""An example that takes longer to fail, most often one that does not end, is not made smaller."""


@dataclass(frozen=True)
class Failure:
    """The smallest example found that fails."""

    kind: str
    """Race, Hazard, Deadlock, EndlessRun, NotAccepted, or SimulationError."""
    message: str
    example: Example
    timeline: tuple[str, ...]
    """The operations that collide, one line each; empty if none do."""


@dataclass(frozen=True)
class Report:
    """What a check came to."""

    schedule: str
    """As it was asked for."""
    asked: int
    """How many examples were to be tried."""
    examples: int
    """How many were, up to the first that failed."""
    seed: int
    failure: Failure | None

    @property
    def passed(self) -> bool:
        return self.failure is None

    @property
    def replay(self) -> str:
        """The command that does the same again, quoted for a shell."""
        return f"flashsim check {shlex.quote(self.schedule)} --examples {self.asked} --seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys, as `--json` prints it."""
        failure = self.failure
        return {
            "schedule": self.schedule,
            "passed": self.passed,
            "examples": self.examples,
            "seed": self.seed,
            "replay": self.replay,
            "failure": failure and {
                "kind": failure.kind,
                "message": failure.message,
                "example": describe(failure.example),
                "timeline": list(failure.timeline),
            },
        }  # fmt: skip


def check(
    schedule: str, examples: int = EXAMPLES, seed: int = 0, progress: Callable[[], None] = lambda: None
) -> Report:
    """Run `schedule` (a name, or FILE.py:CLASS) on `examples` drawn examples, each at the latencies of hardware and at
    drawn ones, and demand exact results, no race, no hazard and no deadlock.

    The same seed draws the same cases. `progress` is called after each. Raises InputError for a schedule that does not
    exist, cannot be run, or accepts no problem that is tried.
    """
    kind = load_schedule(schedule)
    for architecture in architectures_of(kind):
        for dtype in dtypes_of(kind):
            for impl in impls_of(kind, architecture, dtype):
                values_of(kind, architecture, dtype, impl)  # what does not end there ends the check
    search = _Search(progress)
    try:
        for_examples(kind, examples, seed, search.run)
    except SimulationError:
        assert search.worst is not None
    except NothingAccepted:
        raise InputError(f"schedule {schedule} accepts none of the problems and switches that were tried") from None
    failure = None
    if search.worst is not None:
        example, error = search.worst
        failure = Failure(type(error).__name__, str(error), example, tuple(_timeline(example, error)))
    return Report(schedule, examples, search.tried, seed, failure)


class _Search:
    """Runs cases for Hypothesis, which looks for the smallest that fails, and ends the looking in time."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self.tried = 0
        self.worst: tuple[Example, SimulationError] | None = None
        """The last case that failed: Hypothesis ends with the smallest."""
        self._progress = progress
        self._failed: dict[str, SimulationError] = {}
        self._until = 0.0

    def run(self, example: Example) -> None:
        """Raises what the case fails with."""
        error = self._failed.get(repr(example)) or self._error(example)
        if error is not None:
            self._failed[repr(example)] = error
            self.worst = example, error
            raise error.with_traceback(None)

    def _error(self, example: Example) -> SimulationError | None:
        first = not self._failed
        if first:
            self.tried += 1
            self._until = time.monotonic() + SHRINKING_S
        elif time.monotonic() > self._until:
            return None  # looked for long enough: nothing fails any more but what has failed before
        begin, found = time.monotonic(), None
        try:
            example.check()
        except SimulationError as error:
            if time.monotonic() - begin > SLOW_S:
                self._until = 0.0
            found = error
        if first:
            self._progress()
        return found


def _timeline(example: Example, error: SimulationError) -> list[str]:
    """Run the failing case once more and note what is done to the slot that the error is about."""
    for latencies in (Latencies(), example.latencies):
        trace = Trace()
        try:
            example.compute(latencies, trace)
        except SimulationError as again:
            if str(again) == str(error):
                return timeline(trace, getattr(again, "memory", None))
    return []


def describe(example: Example) -> dict[str, Any]:
    """The case in words and numbers."""
    p = example.problem
    return {
        "problem": {name: getattr(p, name) for name in p.__dataclass_fields__},
        "switches": example.options,
        "gpu": example.gpu,
        "sms": example.sms,
        "inputs": {"kind": example.attention.kind, "seed": example.attention.seed},
        "latencies": str(example.latencies),
        "rounded": example.rounded,
    }
