"""`check --mutants`: is every wait and every signal of a schedule needed, and would a run notice that it is missing?

Each mutant runs on drawn cases at the latencies of hardware until one run notices: by a race, a hazard, a deadlock, or
numbers that are not accepted. One that cannot run, because a name has no value yet where the statement came to stand,
is invalid and proves nothing.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from flashsim.analysis.parallel import in_order
from flashsim.check.draw import NothingAccepted, drawn_examples
from flashsim.check.equivalent import PARTS, file_of, parts_of, reason_for, source_of
from flashsim.check.example import Example
from flashsim.check.mutants import EXECUTED, Mutant, mutants_of, probed
from flashsim.errors import InputError, SimulationError
from flashsim.problem import q_tiles
from flashsim.schedules import Schedule, load_schedule
from flashsim.watchdog import Stuck, Watchdog

DRAWN, KEPT = 1000, 128
"""Examples that are drawn, and those of them that are most different from each other; more, where these miss a line."""
MANY_TILES = 4
"""Of KV, or backward of Q, for one block; more are no other case."""
HEAD_DIMS = 64
"""Head dims in the same steps of so many are alike."""
TRIED = 32
"""On so many of these, at most, a mutant runs: on such as execute its line."""
KILLED, EQUIVALENT, INVALID, NOT_RUN, SURVIVED = "killed", "equivalent", "invalid", "not run", "survived"


Line = tuple[Path, int]
"""Of a file. A class would not do: a user's file makes another one whenever it is loaded."""


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    file: str
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
    complete: bool = True
    """False if an interruption left mutants without a verdict."""

    @property
    def passed(self) -> bool:
        """No mutant is left without a word."""
        return self.complete and not {verdict.outcome for verdict in self.verdicts} & {SURVIVED, NOT_RUN}

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


def mutants_in(schedule: str) -> list[tuple[type, Mutant]]:
    """The mutants of a schedule's files, each with the class in whose file it is."""
    return [(part, mutant) for part in parts_of(load_schedule(schedule)) for mutant in _mutants_of(source_of(part))]


@cache
def _mutants_of(source: str) -> tuple[Mutant, ...]:
    """Once for each text: every verdict asks for them."""
    return tuple(mutants_of(source))


def survey(schedule: str, numbers: list[int] | None = None, workers: int | None = None) -> Iterator[Verdict]:
    """Judge the mutants of `schedule` (those with these `numbers`, or all), in the order of the file.

    Raises InputError for a schedule that does not exist, cannot be run, or accepts no problem that is tried, and
    SimulationError for one that fails without any change. What the file prints goes to stderr.
    """
    chosen = range(len(mutants_in(schedule))) if numbers is None else numbers
    jobs = [(schedule, number) for number in chosen]
    yield from in_order(_judge, jobs, os.cpu_count() or 1 if workers is None else workers)


def _judge(job: tuple[str, int]) -> Verdict:
    with redirect_stdout(sys.stderr):  # a worker's stdout is the program's, on which there may be JSON
        return _verdict(*job)


def _verdict(schedule: str, number: int) -> Verdict:
    kind = load_schedule(schedule)
    part, mutant = mutants_in(schedule)[number]
    trials = _trials_of(schedule, (file_of(part), mutant.line))
    outcome, how, runs = SURVIVED if trials else NOT_RUN, "", 0
    said = (file_of(part).name, mutant.function, mutant.line, mutant.statement, mutant.change)
    try:
        changed = _with_part(kind, part, _load(mutant.source, part))
    except InputError as refused:
        return Verdict(*said, INVALID, str(refused), runs)
    for example in trials:
        runs += 1
        error = _noticed(replace(example, schedule=changed))
        if error is not None:
            invalid = isinstance(error.__cause__, NameError | AttributeError | TypeError)
            outcome, how = (INVALID, str(error.__cause__)) if invalid else (KILLED, type(error).__name__)
            break
    if outcome == SURVIVED and (reason := reason_for(mutant, part.__name__, source_of(part))):
        outcome, how = EQUIVALENT, reason
    return Verdict(*said, outcome, how, runs)


@cache
def _trials_of(schedule: str, line: Line) -> list[Example]:
    """Those of the drawn examples on which the mutants of `line` run."""
    return _varied([example for example, lines in _trials(schedule) if line in lines], TRIED)


def _noticed(example: Example) -> SimulationError | None:
    try:
        example.run()
    except SimulationError as error:
        return error
    return None


@cache
def _trials(schedule: str) -> list[tuple[Example, frozenset[Line]]]:
    """Drawn examples and the lines of mutated statements that each executes.

    Raises SimulationError if the schedule itself is wrong, and InputError if it accepts none.
    """
    try:
        return _run_unchanged(load_schedule(schedule))
    except NothingAccepted:
        raise InputError(f"schedule {schedule} accepts none of the problems and switches that were tried") from None
    except SimulationError as error:
        error.memory = None  # too much to send to another process
        error.add_note(f"the schedule fails as it is: run flashsim check {shlex.quote(schedule)} first")
        raise


def _run_unchanged(kind: type[Schedule]) -> list[tuple[Example, frozenset[Line]]]:
    watched, executed, unseen = kind, dict[Path, set[int]](), set[Line]()
    for part in parts_of(kind):
        text = source_of(part)
        probe = _load(probed(text), part)
        watched = _with_part(watched, part, probe)
        executed[file_of(part)] = getattr(sys.modules[probe.__module__], EXECUTED)
        unseen |= {(file_of(part), mutant.line) for mutant in _mutants_of(text)}
    trials = []
    for number, example in enumerate(_varied(drawn_examples(kind, DRAWN), DRAWN)):
        if number >= KEPT and not unseen:
            break
        for lines_of_file in executed.values():
            lines_of_file.clear()
        replace(example, schedule=watched, rounded=False).run()
        lines = {(file, line) for file, lines_of_file in executed.items() for line in lines_of_file}
        if number < KEPT or unseen & lines:
            trials.append((replace(example, rounded=False), frozenset(lines)))
        unseen -= lines
    return trials


def _varied(examples: list[Example], count: int) -> list[Example]:
    """`count` of them, each with as many triples of traits as can be that those before it had not; large ones first."""
    traits = [_traits(example) for example in examples]
    left = [(-len(traits[n]), -example.problem.flops, n) for n, example in enumerate(examples)]
    heapify(left)
    ordered, seen = list[Example](), set[frozenset[object]]()
    while left and len(ordered) < count:
        news, flops, n = heappop(left)
        now = -len(traits[n] - seen)
        if now > news:  # others have had some of them since: it may not be the first any more
            heappush(left, (now, flops, n))
            continue
        ordered.append(examples[n])
        seen |= traits[n]
    return ordered


def _traits(example: Example) -> set[frozenset[object]]:
    """Every three of the things that are special about an example."""
    p, options = example.problem, example.options
    kv = p.mask_rule.walk(range(p.seqlen_q), options.get("BLOCK_N", 128), p.seqlen_q, p.seqlen_k).count
    q = q_tiles(p, 0, options.get("bwd_BLOCK_M", 64), options.get("bwd_BLOCK_N", 128)).count
    alone = {
        *options.items(),
        ("direction", p.direction),
        ("dtype", p.element_bytes),
        ("head dim", max(p.head_dim, p.head_dim_v) // HEAD_DIMS),
        ("dropout", p.dropout > 0),
        ("mask", p.mask_rule.kind),
        ("gpu", example.gpu),
        ("sms", example.sms),
        ("KV tiles", min(kv, MANY_TILES)),
        ("Q tiles", min(q, MANY_TILES) if "bwd" in p.passes else 0),
    }
    return {frozenset(three) for three in combinations(alone, 3)}


def _with_part(kind: type[Schedule], part: type, changed: type) -> type[Schedule]:
    """`kind` with one of its parts changed: another class, or the same with, say, another backward pass."""
    if issubclass(part, Schedule):
        assert issubclass(changed, Schedule)
        return changed
    name = next(name for name in PARTS if getattr(kind, name, None) is part)
    return type(kind.__name__, (kind,), {name: changed, "__module__": kind.__module__})


def _load(text: str, kind: type) -> type:
    """The class called like `kind` in a file with `text`, which finds its neighbors where the file of `kind` does.

    Raises InputError if the text cannot be run.
    """
    file = str(file_of(kind))
    module = ModuleType(f"flashsim_changed_{kind.__module__.replace('.', '_')}")
    module.__file__ = file
    setattr(module, EXECUTED, set())  # for a statement of a probed file that runs while the file is loaded
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    try:
        with Watchdog():
            exec(compile(text, file, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit, Stuck) as error:
        raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}") from None
    found = getattr(module, kind.__name__)
    assert isinstance(found, type)
    return found
