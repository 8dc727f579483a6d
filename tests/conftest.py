"""Settings of all tests: which trees are tested, and Hypothesis profiles."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Small products in float64 are quicker on one thread, by far where the machine is busy; must be set before numpy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Kernels run in Triton's interpreter, and are compiled in other processes; must be set before triton loads.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Deterministic: a red test is red again in the next run, and on another machine.
settings.register_profile("dev", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=200)
# Other examples every night; a failure prints what replays it.
settings.register_profile("nightly", print_blob=True, deadline=None, database=None, max_examples=100_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def tree_of(package: str) -> Path | None:
    """The folder that the package's folder lies in; None if it cannot be imported."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parents[1]


def use_kernels_of_this_tree() -> None:
    """Import `kernels/` under its installed name, as an editable installation does."""
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "flashsim_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flashsim_kernels"] = module
    spec.loader.exec_module(module)


def pytest_configure() -> None:
    # `python -m pytest` imports the `flashsim` that lies here. `flashsim_kernels` lies in `kernels/`, so that Python
    # would find only an installed copy, perhaps an older one.
    if tree_of("flashsim") == ROOT:
        use_kernels_of_this_tree()
    trees = {package: tree_of(package) for package in ("flashsim", "flashsim_kernels")}
    if trees["flashsim_kernels"] not in (None, trees["flashsim"]):
        raise pytest.UsageError(
            f"flashsim is imported from {trees['flashsim']} and flashsim_kernels from {trees['flashsim_kernels']}: "
            "the tests would mix two versions. Run `python -m pytest` in the root of the repository."
        )
