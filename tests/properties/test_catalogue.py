"""Every known bug is rejected, and the kernel without it is accepted in every case in which that was tried."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import twin
from catalogue import CATALOGUE, SOURCE, Bug
from rules import RULES
from twin_cases import LISTED, PARTS, Prepared

from flashsim.numerics.compare import Comparison

TABLE = Path(__file__).parents[2] / "docs" / "kill-table.md"
BUGS = {bug.key: bug for bug in CATALOGUE}


@cache
def prepared(part: str) -> tuple[Prepared, ...]:
    return tuple(Prepared(case) for case in LISTED if case.part == part)


def results(bug: Bug) -> Iterator[Comparison]:
    """What the rule says of the bug in one case after another. Overflow and NaN are what some bugs are about."""
    module = bug.module()
    for case in prepared(bug.part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield case.judge(case.run(module))


def test_the_catalogue_is_large_and_its_keys_differ() -> None:
    assert len(BUGS) == len(CATALOGUE) > 100
    assert {bug.part for bug in CATALOGUE} == set(PARTS)


@pytest.mark.parametrize("key", BUGS)
def test_a_bug_keeps_line_numbers(key: str) -> None:
    """Each change fits one line and changes it."""
    text = BUGS[key].text().splitlines()
    changed = [n for n, (old, new) in enumerate(zip(SOURCE.splitlines(), text, strict=True)) if old != new]
    assert len(changed) == len(BUGS[key].changes)


@pytest.mark.parametrize("part", PARTS)
def test_the_twin_is_accepted(part: str) -> None:
    for case in prepared(part):
        outputs = case.run(twin)
        assert case.judge(outputs).broken == (), case.case
        assert case.stays_within_bounds(outputs), case.case


@pytest.mark.parametrize("key", BUGS)
def test_every_bug_is_rejected(key: str) -> None:
    assert any(not result.accepted for result in results(BUGS[key]))


@pytest.mark.parametrize(
    ("key", "clause"),
    [
        ("backward: dQ of the last KV tile lost", "largest error"),
        ("forward: not divided by the sum", "mean error"),
        ("backward: zeros", "zeros where the reference is not"),
        ("forward: sum of rounded P", "LSE"),
        ("fp8: P truncated", "L2 distance"),
    ],
)
def test_no_clause_can_be_spared(key: str, clause: str) -> None:
    """In some case this clause alone tells the bug from the correct kernel."""
    assert any(
        result.broken and all(clause in broken.what for broken in result.broken) for result in results(BUGS[key])
    )


def test_the_table_is_up_to_date() -> None:
    """docs/kill-table.md has every bug, all of them rejected by flashsim's rule, which raises no false alarm."""
    text = TABLE.read_text(encoding="utf-8")
    header, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    )
    assert header[3:] == ["flashsim", *RULES]
    counts = {row[0]: row[3] for row in rows if ": " in row[0]}
    assert {key: bug.described() for key, bug in BUGS.items()} == {row[0]: row[1] for row in rows if ": " in row[0]}
    assert all(re.fullmatch(r"[1-9]\d*", count) for count in counts.values())
    alarms = [row for row in rows if row[0].startswith("correct")]
    assert len(alarms) == len(PARTS)
    assert {row[3] for row in alarms} == {"0"}
