"""tests/README.md: the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parents[1]
TEXT = (TESTS / "README.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_every_test_that_is_named_exists(path: str) -> None:
    defined = set(re.findall(r"^def (test_\w+)\(", (TESTS / path).read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {name for file, name in NAMED if file == path} <= defined


def test_every_folder_is_listed() -> None:
    for folder in TESTS.iterdir():
        if any(folder.glob("test_*.py")):
            assert f"`{folder.name}`" in TEXT


@pytest.mark.parametrize(
    ("profile", "examples"), re.findall(r"^\| `(\w+)`(?:, the default)? \| ([\d ]+) \|", TEXT, flags=re.M)
)
def test_profiles(profile: str, examples: str) -> None:
    assert settings.get_profile(profile).max_examples == int(examples.replace(" ", ""))


def test_no_profile_is_left_out() -> None:
    conftest = (TESTS / "conftest.py").read_text(encoding="utf-8")
    for profile in re.findall(r'register_profile\("(\w+)"', conftest):
        assert f"| `{profile}`" in TEXT


def test_file_names_differ_in_all_folders() -> None:
    names = [path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
