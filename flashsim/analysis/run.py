"""Run the cases of a scenario and put each prediction beside its measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flashsim.analysis.parallel import in_order
from flashsim.errors import InputError, SimulationError
from flashsim.io.beside import Published
from flashsim.io.scenario import Scenario, ScenarioCase
from flashsim.result import Result
from flashsim.simulate import simulate


@dataclass(frozen=True)
class CaseOutcome:
    """What came of one case: a result, or the mistakes that make it impossible, or how its simulation failed."""

    case: ScenarioCase
    result: Result | None = None
    refused: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def error(self) -> float | None:
        """Predicted time / measured time - 1; None without a measurement."""
        if self.result is None or self.case.measured is None:
            return None
        return self.result.time_us / self.case.measured.time_us - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        measured = self.case.measured
        return {
            "case": self.case.case.keys,
            "result": None if self.result is None else self.result.to_json(),
            "failure": self.failure,
            "measured": None if measured is None else dict(vars(measured)),
            "error": self.error,
        }


@dataclass(frozen=True)
class PublishedBeside:
    """A published fraction of the datasheet's peak beside the highest predicted one among the cases it is about."""

    published: Published
    highest: float
    at: str
    schedule: str

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return {
            "schedule": self.schedule,
            "published_datasheet_fraction": self.published.datasheet_fraction,
            "source": self.published.source,
            "highest_predicted_datasheet_fraction": self.highest,
            "case": self.at,
        }


def run_cases(scenario: Scenario, workers: int = 1) -> Iterator[CaseOutcome]:
    """Simulate the cases, on `workers` processes, in the order of the scenario."""
    return in_order(run_case, scenario.cases, workers)


def run_case(case: ScenarioCase) -> CaseOutcome:
    """Simulate one case. Raises nothing that belongs to it."""
    inner = case.case
    try:
        result = simulate(inner.problem, inner.schedule, inner.gpu, clock_mhz=inner.clock_mhz, options=inner.options)
    except InputError as error:
        return CaseOutcome(case, refused=error.problems)
    except SimulationError as error:
        return CaseOutcome(case, failure=f"{type(error).__name__}: {error}")
    return CaseOutcome(case, result)


def raise_refused(scenario: Scenario, outcomes: Iterable[CaseOutcome]) -> None:
    """Raises InputError with every reason for which a case cannot be simulated, if there is one."""
    problems = [f"{scenario.path}: {outcome.case.label}: {line}" for outcome in outcomes for line in outcome.refused]
    if problems:
        raise InputError(problems)


def run_scenario(scenario: Scenario) -> list[CaseOutcome]:
    """All outcomes. Raises InputError if a case does not fit its GPU."""
    outcomes = list(run_cases(scenario))
    raise_refused(scenario, outcomes)
    return outcomes


def published_beside(scenario: Scenario, outcomes: Sequence[CaseOutcome]) -> list[PublishedBeside]:
    """Each published fraction with the highest prediction, as far as its cases were run."""
    beside = []
    for published in scenario.published:
        done = [outcomes[index] for index in published.cases if index < len(outcomes)]
        results = [(outcome.result, outcome.case.label) for outcome in done if outcome.result is not None]
        if results:
            best, label = max(results, key=lambda pair: pair[0].datasheet_fraction)
            beside.append(PublishedBeside(published, best.datasheet_fraction, label, best.schedule))
    return beside
