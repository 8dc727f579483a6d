"""Fewer examples for surveys of mutants than `flashsim check --mutants` takes: a sample is what is tried here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashsim.check import survey


@pytest.fixture(autouse=True, scope="session")
def _fewer_examples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "DRAWN", 300)
        patch.setattr(survey, "KEPT", 48)
        yield
