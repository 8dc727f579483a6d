"""`check --mutants`: is every wait and every signal of a schedule needed, and would a run notice that it is missing?

Each mutant runs on drawn cases at the latencies of hardware until one run notices: by a race, a hazard, a deadlock, or
numbers that are not accepted. One that cannot run, because a name has no value yet where the statement came to stand,
is invalid and proves nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from flashsim.analysis.parallel import in_order
from flashsim.check.draw import drawn_examples
from flashsim.check.equivalent import reason_for
from flashsim.check.example import Example
from flashsim.check.mutants import EXECUTED, Mutant, mutants_of, probed
from flashsim.errors import SimulationError
from flashsim.schedules import Schedule, load_schedule

DRAWN, KEPT = 300, 96
"""Examples that are drawn, and those of them that are most different from each other; more, where these miss a line."""
TRIED = 32
"""On so many of these, at most, a mutant runs: on such as execute its line."""
KILLED, EQUIVALENT, INVALID, NOT_RUN, SURVIVED = "killed", "equivalent", "invalid", "not run", "survived"


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    function: str
    line: int
    statement: str
    change: str
    outcome: str
    """killed, equivalent, invalid, not run (no example executes the line) or survived."""
    how: str
    """The error that noticed it, or the reason why it is right."""
    runs: int


@dataclass(frozen=True)
class Survey:
    """All mutants of one schedule."""

    schedule: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """No mutant is left without a word."""
        return not {verdict.outcome for verdict in self.verdicts} & {SURVIVED, NOT_RUN}

    @property
    def counts(self) -> dict[str, int]:
        """Mutants by outcome."""
        found = Counter(verdict.outcome for verdict in self.verdicts)
        return {outcome: found[outcome] for outcome in (KILLED, EQUIVALENT, INVALID, NOT_RUN, SURVIVED)}

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys, as `--json` prints it."""
        return {
            "schedule": self.schedule,
            "passed": self.passed,
            "counts": self.counts,
            "mutants": [dict(vars(verdict)) for verdict in self.verdicts],
        }


def mutants_in(schedule: str) -> list[Mutant]:
    """The mutants of a schedule's file."""
    return mutants_of(_source(load_schedule(schedule)))


def survey(schedule: str, numbers: list[int] | None = None, workers: int | None = None) -> Iterator[Verdict]:
    """Judge the mutants of `schedule` (those with these `numbers`, or all), in the order of the file.

    Raises InputError for a schedule that does not exist or cannot be run.
    """
    chosen = range(len(mutants_in(schedule))) if numbers is None else numbers
    jobs = [(schedule, number) for number in chosen]
    yield from in_order(_judge, jobs, os.cpu_count() or 1 if workers is None else workers)


def _judge(job: tuple[str, int]) -> Verdict:
    schedule, number = job
    kind = load_schedule(schedule)
    mutant = mutants_of(_source(kind))[number]
    trials = _varied([example for example, lines in _trials(schedule) if mutant.line in lines], TRIED)
    outcome, how, runs = SURVIVED if trials else NOT_RUN, "", 0
    changed = _load(mutant.source, kind)
    for example in trials:
        runs += 1
        error = _noticed(replace(example, schedule=changed))
        if error is not None:
            invalid = isinstance(error.__cause__, NameError | AttributeError | TypeError)
            outcome, how = (INVALID, str(error.__cause__)) if invalid else (KILLED, type(error).__name__)
            break
    if outcome == SURVIVED and (reason := reason_for(schedule, mutant)):
        outcome, how = EQUIVALENT, reason
    return Verdict(mutant.function, mutant.line, mutant.statement, mutant.change, outcome, how, runs)


def _noticed(example: Example) -> SimulationError | None:
    try:
        example.run()
    except SimulationError as error:
        return error
    return None


@cache
def _trials(schedule: str) -> list[tuple[Example, frozenset[int]]]:
    """Drawn examples and the lines of mutated statements that each executes.

    Raises SimulationError if the schedule itself is wrong.
    """
    kind = load_schedule(schedule)
    text = _source(kind)
    watched = _load(probed(text), kind)
    lines: set[int] = getattr(sys.modules[watched.__module__], EXECUTED)
    unseen = {mutant.line for mutant in mutants_of(text)}
    trials = []
    for number, example in enumerate(_varied(drawn_examples(kind, DRAWN), DRAWN)):
        if number >= KEPT and not unseen:
            break
        lines.clear()
        replace(example, schedule=watched, rounded=False).run()
        if number < KEPT or unseen & lines:
            trials.append((replace(example, rounded=False), frozenset(lines)))
        unseen -= lines
    return trials


def _varied(examples: list[Example], count: int) -> list[Example]:
    """`count` of them, each with as many pairs of traits as can be that those before it had not; larger ones first."""
    left, ordered = {id(example): (example, _traits(example)) for example in examples}, list[Example]()
    seen: set[frozenset[object]] = set()
    while left and len(ordered) < count:
        key = max(left, key=lambda key: (len(left[key][1] - seen), left[key][0].problem.flops))
        example, traits = left.pop(key)
        ordered.append(example)
        seen |= traits
    return ordered


def _traits(example: Example) -> set[frozenset[object]]:
    """Every pair of what is special about an example."""
    kind_of_mask = example.problem.mask.partition(":")[0]
    alone = {*example.options.items(), ("mask", kind_of_mask), ("gpu", example.gpu), ("sms", example.sms)}
    return {frozenset(pair) for pair in combinations(alone, 2)}


def _source(kind: type[Schedule]) -> str:
    file = sys.modules[kind.__module__].__file__
    assert file is not None
    return Path(file).read_text(encoding="utf-8")


def _load(text: str, kind: type[Schedule]) -> type[Schedule]:
    """The class called like `kind` in a file with `text`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.py"
        path.write_text(text, encoding="utf-8")
        return load_schedule(f"{path}:{kind.__name__}")
