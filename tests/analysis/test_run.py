"""Running a scenario: order, errors against measurements, refusals, failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.analysis.run import published_beside, run_scenario
from flashsim.analysis.tables import run_footer
from flashsim.errors import Deadlock, InputError
from flashsim.io.scenario import Scenario, read_scenario
from flashsim.simulate import simulate

TEXT = """
[case]
gpu = "h100-sxm5"
schedule = "fa3"
batch = 1
heads = 4
seqlen = 256
head_dim = 64
[grid]
mask = ["full", "causal"]
[[measured]]
mask = "causal"
time_us = 10
source = "a test"
[[published]]
datasheet_fraction = 0.5
source = "another test"
"""


def scenario(folder: Path, text: str = TEXT) -> Scenario:
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return read_scenario(path)


def test_each_case_is_simulated_in_order(tmp_path: Path) -> None:
    cases = scenario(tmp_path)
    outcomes = run_scenario(cases)
    expected = [simulate(case.case.problem, "fa3", "h100-sxm5") for case in cases.cases]
    assert [outcome.result for outcome in outcomes] == expected
    assert outcomes[0].error is None
    assert outcomes[1].error == pytest.approx(expected[1].time_us / 10 - 1)


def test_switches_and_clock_reach_the_simulation(tmp_path: Path) -> None:
    text = TEXT.replace("head_dim = 64", "head_dim = 64\nclock_mhz = 1500\nset = { num_stages = 1 }")
    result = run_scenario(scenario(tmp_path, text))[0].result
    assert result is not None
    assert (result.clock_mhz, result.options["num_stages"]) == (1500, 1)


def test_a_published_fraction_stands_beside_the_highest_prediction(tmp_path: Path) -> None:
    cases = scenario(tmp_path)
    outcomes = run_scenario(cases)
    (beside,) = published_beside(cases, outcomes)
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    assert beside.highest == max(result.datasheet_fraction for result in results)
    assert any("published 50 %" in line for line in run_footer(cases, outcomes))


def test_the_footer_states_the_clock_and_its_source(tmp_path: Path) -> None:
    cases = scenario(tmp_path)
    assert any("1830 MHz (assumed" in line for line in run_footer(cases, run_scenario(cases)))


def test_every_case_that_does_not_fit_is_named(tmp_path: Path) -> None:
    text = TEXT.split("[[measured]]")[0].replace("batch = 1", "batch = 2000000000")
    with pytest.raises(InputError) as caught:
        run_scenario(scenario(tmp_path, text))
    places = [line.removeprefix(f"{tmp_path / 'scenario.toml'}: ").split(":")[0] for line in caught.value.problems]
    assert places == ["mask full", "mask causal"]


def test_a_case_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = scenario(tmp_path)
    first = cases.cases[0].case.problem

    def fail_first(problem: object, *arguments: object, **options: object) -> object:
        if problem == first:
            raise Deadlock("everybody waits")
        return simulate(problem, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("flashsim.analysis.run.simulate", fail_first)
    outcomes = run_scenario(cases)
    assert outcomes[0].failure == "Deadlock: everybody waits"
    assert outcomes[1].result is not None
