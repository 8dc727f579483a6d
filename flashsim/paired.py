"""Where `flashsim_kernels` lies, the package of the paired kernels: beside this one, installed or in a source tree."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from flashsim.errors import InputError

_ROOT = Path(__file__).parents[1]


def use_kernels() -> None:
    """Make `flashsim_kernels` that of the tree which this `flashsim` is of; in a source tree it lies in `kernels/`.

    Raises InputError where there is none.
    """
    folder = _ROOT / "kernels"
    if "flashsim_kernels" in sys.modules:
        return
    # Beside an installed flashsim, `kernels` would be another project's package.
    if not (_ROOT / "pyproject.toml").is_file():
        if importlib.util.find_spec("flashsim_kernels") is None:
            raise InputError("flashsim_kernels: is not installed (it comes with flashsim)")
        return
    spec = importlib.util.spec_from_file_location(
        "flashsim_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flashsim_kernels"] = module
    spec.loader.exec_module(module)
