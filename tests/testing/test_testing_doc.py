"""docs/testing.md: its files run as they stand there, its names exist, and what it shows is what comes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from testing_doc import DOC, FILES, TEXT

import flashsim.testing
from flashsim.testing import KINDS, attention_problems

ROOT = DOC.parents[1]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def run_pytest(folder: Path, *names: str, change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
    """The files in a folder of their own, as a user has them: no settings but pytest's and Hypothesis's defaults."""
    for name in names:
        (folder / name).write_text(FILES[name].replace(*change), encoding="utf-8")
    tests = [name for name in names if name.startswith("test_")]
    # Warnings of pytest's plugins about each other are not the examples'.
    warnings = ["-W", "error::RuntimeWarning", "-W", "error::UserWarning"]
    arguments = ["-q", *warnings, "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name != "HYPOTHESIS_PROFILE"}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_example_is_three_lines() -> None:
    lines = FILES["test_my_attention.py"].splitlines()
    start = lines.index("@given(attention_cases())")
    assert len(lines[start:]) == 3


def test_the_examples_pass(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "my_attention.py", "test_my_attention.py", "test_fixed_inputs.py")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_examples_with_torch_pass(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = run_pytest(tmp_path, "test_torch.py", "test_torch_gradients.py")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_message_is_the_one_that_is_shown(tmp_path: Path) -> None:
    """Numbers aside: they follow from what Hypothesis draws."""
    (shown,) = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    done = run_pytest(tmp_path, "my_attention.py", "test_my_attention.py", change=("acc = acc * alpha", "acc = acc"))
    assert done.returncode == 1
    assert "case = AttentionCase(" in done.stdout
    printed = "\n".join(re.findall(r"^E {7}(.*)$", done.stdout, flags=re.MULTILINE))
    assert NUMBER.sub("#", shown.strip()) in NUMBER.sub("#", printed)


def test_every_file_is_run() -> None:
    tests = {"test_my_attention.py", "test_fixed_inputs.py", "test_torch.py", "test_torch_gradients.py"}
    assert set(FILES) == {"my_attention.py", *tests}
    assert TEXT.count("```python\n") == len(FILES)


def test_the_tables_are_complete() -> None:
    for kind in KINDS:
        assert re.search(rf"^\|.*`{kind}`.*\|.*\|$", TEXT, flags=re.MULTILINE), kind
    for name, parameter in inspect.signature(attention_problems).parameters.items():
        row = next(line for line in TEXT.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        default = parameter.default
        shown = ["`2e7`"] if name == "max_flops" else [f"`{default}`", f"`{default!r}`".replace("'", '"')]
        assert any(text in row or text.strip("`") in row for text in shown), name


@pytest.mark.parametrize("name", flashsim.testing.__all__)
def test_public_names(name: str) -> None:
    assert getattr(flashsim.testing, name) is not None
    if name != "Strided":
        assert name in TEXT


@pytest.mark.parametrize("link", re.findall(r"`(flashsim/[\w/]+\.py)`", TEXT))
def test_files_that_it_names_exist(link: str) -> None:
    assert (ROOT / link).exists()
