"""Kernels run in Triton's interpreter, corrected, and what they leave unwritten is NaN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

try:
    import torch
    import triton
except ImportError:  # every test here is skipped, and says so
    triton = None
else:
    from flashsim.gpu.interpreter import correct_interpreter

    correct_interpreter()
    torch.set_num_threads(1)

ALLOCATORS = ("empty", "empty_like", "empty_strided")


def poisoned(allocate: Any) -> Any:
    """`allocate`, with NaN in every element, or the largest number where the dtype has no NaN."""

    def poisoning(*args: Any, **kwargs: Any) -> Any:
        x = allocate(*args, **kwargs)
        if x.dtype.is_floating_point:
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)

    return poisoning


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    if triton is None:
        return
    for name in ALLOCATORS:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _infinities_are_meant() -> Iterator[None]:
    """NumPy, which the interpreter computes with, warns of what a GPU does silently: -inf - -inf in a masked row."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            r"(invalid value|overflow|divide by zero|All-NaN slice) encountered",
            RuntimeWarning,
            r"triton\.runtime\.interpreter",
        )
        yield
