"""Every scenario in the repository runs, and says what its text promises."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import pytest

from flashsim.analysis.run import CaseOutcome, run_scenario
from flashsim.io.claims import is_claims
from flashsim.io.experiment import is_experiment
from flashsim.io.scenario import read_scenario

FOLDER = Path(__file__).parents[1] / "scenarios"
FILES = [path for path in sorted(FOLDER.glob("*.toml")) if not (is_experiment(path) or is_claims(path))]
CASES = {
    "a100-fa2": (22, 10),
    "decode": (8, 0),
    "dropout": (4, 0),
    "fa1-a100": (8, 8),
    "fa1-builds": (3, 0),
    "fa2-backward": (8, 6),
    "fa3-ablation": (3, 3),
    "fa3-backward": (12, 6),
    "fa3-fp8": (5, 0),
    "fa3-three-stages": (6, 0),
    "gqa": (7, 0),
    "h100-forward": (60, 34),
    "h100-locked-clock": (12, 12),
    "head-dims": (18, 0),
    "masks": (22, 0),
    "standard-a100": (8, 8),
    "standard-h100": (5, 5),
}
"""Number of cases, and how many of them were measured."""


@functools.cache
def outcomes_of(name: str) -> list[CaseOutcome]:
    """Each scenario is run once for all tests of this file."""
    return run_scenario(read_scenario(FOLDER / f"{name}.toml"))


def test_every_scenario_is_listed() -> None:
    assert {path.stem for path in FILES} == set(CASES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_measurements_find_their_cases(path: Path) -> None:
    scenario = read_scenario(path)
    measured = [case.measured for case in scenario.cases if case.measured is not None]
    assert (len(scenario.cases), len(measured)) == CASES[path.stem]
    assert len({row.id for row in measured if row.id}) == sum(row.id is not None for row in measured)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scenario_has_a_title_and_says_where_its_numbers_are_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tomllib.loads(text)["title"]
    assert text.startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scenario_runs(path: Path) -> None:
    outcomes = outcomes_of(path.stem)
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
    for outcome in outcomes:
        result = outcome.result
        assert result is not None
        # No prediction is beyond what the tensor cores can do, and none is a placeholder.
        assert 0 < result.peak_fraction < 1, outcome.case.label
        assert 0 < result.utilization["tensor"].active <= 1, outcome.case.label


def test_the_ablation_without_warp_specialization_is_slower() -> None:
    whole, _, unspecialized = outcomes_of("fa3-ablation")
    assert whole.result is not None
    assert unspecialized.result is not None
    assert unspecialized.result.time_us > whole.result.time_us
