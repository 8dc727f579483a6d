"""Generators in other processes: what they yield, refuse, and how they end."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from flashsim.errors import InputError
from flashsim.gpu.worker import WorkerDied, reports, require_torch_and_triton
from flashsim.paired import use_kernels

ROOT = Path(__file__).parents[2]
THERE = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


def test_what_is_yielded_comes_in_order_and_what_is_printed_does_not() -> None:
    assert list(reports("worker_tasks:count", {"to": 3}, THERE)) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_the_environment_is_set_and_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSIM_TEST_KEPT", "kept")
    monkeypatch.setenv("FLASHSIM_TEST_GONE", "here")
    names = ["FLASHSIM_TEST_KEPT", "FLASHSIM_TEST_GONE", "FLASHSIM_TEST_NEW"]
    environment = {**THERE, "FLASHSIM_TEST_GONE": None, "FLASHSIM_TEST_NEW": "new"}
    assert list(reports("worker_tasks:settings", {"names": names}, environment)) == [
        dict(zip(names, ["kept", None, "new"], strict=True))
    ]


def test_the_other_process_has_this_tree() -> None:
    found = next(reports("worker_tasks:kernels", {}, THERE))
    assert found == {
        "flashsim": str(ROOT / "flashsim" / "__init__.py"),
        "kernels": str(ROOT / "kernels" / "__init__.py"),
    }


def test_bad_input_there_is_bad_input_here() -> None:
    with pytest.raises(InputError) as caught:
        list(reports("worker_tasks:refuse", {}, THERE))
    assert caught.value.problems == ("one: is wrong", "two: is wrong")


@pytest.mark.parametrize(
    ("how", "said"),
    [("signal", "ended by signal 9"), ("exception", "ended with exit code 1"), ("sleep", "nothing came for 2 s")],
)
def test_a_process_that_dies_says_how(how: str, said: str) -> None:
    began = time.monotonic()
    found = []
    with pytest.raises(WorkerDied) as caught:
        found += list(reports("worker_tasks:die", {"how": how}, THERE, patience_s=2.0 if how == "sleep" else 60.0))
    assert str(caught.value).startswith(said)
    assert "the last words" in str(caught.value)
    assert ("RuntimeError: a fault" in str(caught.value)) == (how == "exception")
    assert time.monotonic() - began < 60


def test_a_process_ends_with_who_asked_for_it() -> None:
    asked = reports("worker_tasks:die", {"how": "sleep"}, THERE)
    next(asked)
    asked.close()  # waits for the process, which would sleep for ten minutes


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"x needs torch and triton: pip install 'flashsim\[kernels\]'"):
        require_torch_and_triton("x")


def test_kernels_of_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = sys.modules["flashsim_kernels"]
    use_kernels()
    assert sys.modules["flashsim_kernels"] is loaded
    monkeypatch.delitem(sys.modules, "flashsim_kernels")
    use_kernels()
    assert sys.modules["flashsim_kernels"].__file__ == str(ROOT / "kernels" / "__init__.py")
