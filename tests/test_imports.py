"""Imports run one way, each heavy library has its one place, and pyproject.toml names every package."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLASHSIM = ROOT / "flashsim"

LAYERS = (
    ("units", "errors", "watchdog", "paired"),
    ("masks", "problem", "packing"),
    ("result", "devices"),
    ("schedules", "numerics", "engine"),
    ("testing",),
    ("machine",),
    ("simulate",),
    ("io",),
    ("analysis",),
    ("check", "sweep", "gpu", "report"),
    ("cli",),
    ("__init__", "__main__"),
)
"""What may be imported comes first. `masks` is the part of `problem` that needs a file of its own."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
INSIDE_ONE_LAYER = {
    ("paired", "errors"),
    ("problem", "masks"),
    ("packing", "masks"),
    ("packing", "problem"),
    ("__main__", "__init__"),
}
ONLY_IN = {"simpy": {"engine"}, "torch": {"gpu"}, "triton": {"gpu"}}
FILES = sorted(FLASHSIM.rglob("*.py"))


def part_of(path: Path) -> str:
    """`io` for flashsim/io/case.py, `masks` for flashsim/masks.py."""
    return path.relative_to(FLASHSIM).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of the file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "flashsim":
                yield from ((node.lineno, f"flashsim.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def parts_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imported(path):
        top, _, rest = name.partition(".")
        # The version is a fact about the whole package, which a result states.
        if top == "flashsim" and rest != "__version__":
            part = rest.partition(".")[0]
            yield line, part if part in LEVEL else "__init__"


def violations(path: Path) -> list[str]:
    own = part_of(path)
    found = []
    for line, other in parts_imported(path):
        if other == own or (own, other) in INSIDE_ONE_LAYER:
            continue
        if LEVEL[other] >= LEVEL[own] or (own == "engine" and other not in ("units", "errors", "watchdog")):
            found.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FLASHSIM)))
def test_imports_run_one_way(path: Path) -> None:
    assert part_of(path) in LEVEL, f"{path} has no place in the import rule"
    assert violations(path) == []


def test_the_rule_notices_an_import_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FLASHSIM", tmp_path / "flashsim")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    engine = tmp_path / "flashsim" / "engine" / "server.py"
    engine.parent.mkdir(parents=True)
    engine.write_text("from flashsim.result import Result\ndef late():\n    import flashsim.cli\n")
    assert len(violations(engine)) == 2


@pytest.mark.parametrize(("library", "parts"), ONLY_IN.items())
def test_a_heavy_library_is_imported_in_one_place(library: str, parts: set[str]) -> None:
    importers = {part_of(path) for path in FILES for _, name in imported(path) if name.partition(".")[0] == library}
    assert importers <= parts


def test_simpy_is_what_the_engine_runs_on() -> None:
    engine = [path for path in FILES if part_of(path) == "engine"]
    assert any(name.partition(".")[0] == "simpy" for path in engine for _, name in imported(path))


def test_kernels_stand_alone() -> None:
    """A kernel file imports no simulator."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        assert all(name.partition(".")[0] != "flashsim" for _, name in imported(path)), path


def test_pyproject_names_every_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in FLASHSIM.rglob("__init__.py")}
    for path in (ROOT / "kernels").rglob("__init__.py"):
        found.add(".".join(("flashsim_kernels", *path.parent.relative_to(ROOT / "kernels").parts)))
    assert set(setup["packages"]) == found
    assert setup["package-dir"]["flashsim_kernels"] == "kernels"


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after `code`."""
    command = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


@pytest.mark.parametrize("module", ["flashsim", "flashsim.cli"])
def test_start_is_light(module: str) -> None:
    """Nothing heavy before a command needs it: `flashsim --help` answers in 0.3 s."""
    heavy = {"numpy", "ml_dtypes", "pydantic", "simpy", "hypothesis", "torch", "triton"}
    assert modules_after(f"import {module}") & heavy == set()
