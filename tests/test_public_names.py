"""The names that `import flashsim` offers."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import flashsim


def test_all_names_exist_and_are_sorted() -> None:
    assert flashsim.__all__ == sorted(flashsim.__all__)
    for name in flashsim.__all__:
        assert getattr(flashsim, name) is not None
    assert set(flashsim.__all__) <= set(dir(flashsim))


def test_no_public_name_is_left_out() -> None:
    assert set(flashsim.__all__) == {"__version__", *flashsim._MODULES}


def test_every_error_is_offered() -> None:
    from flashsim import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes <= set(flashsim.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="simulat"):
        _ = flashsim.simulat  # type: ignore[attr-defined]


def test_version_is_a_version() -> None:
    assert re.match(r"\d+(\.\d+)*", flashsim.__version__)


@pytest.mark.parametrize("first", ["import flashsim.simulate", "from flashsim.simulate import simulate", ""])
def test_simulate_is_the_function_whoever_imports_first(first: str) -> None:
    """The submodule of the same name must not replace it."""
    code = f"{first}\nimport flashsim\nassert callable(flashsim.simulate), flashsim.simulate"
    subprocess.run([sys.executable, "-c", code], check=True)
