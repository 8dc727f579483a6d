"""The catalogue of kernels that are tried, and the search for the smallest problem on which one fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from flashsim.errors import InputError  # noqa: E402
from flashsim.gpu import exactness  # noqa: E402
from flashsim.gpu.exactness import (  # noqa: E402
    CUDA,
    INTERPRETER,
    SHAPES,
    STAND_IN,
    SUBJECTS,
    poisoned_outputs,
    subjects_of,
    work,
)
from flashsim.gpu.kernels import KERNELS  # noqa: E402
from flashsim.gpu.trials import Trial, mask_arguments  # noqa: E402
from flashsim.problem import AttentionProblem  # noqa: E402
from flashsim.testing import AttentionCase, Layout  # noqa: E402


def test_every_kernel_that_is_audited_is_tried() -> None:
    assert set(SUBJECTS) == set(KERNELS)
    for name in SUBJECTS:
        assert importlib.util.find_spec(f"flashsim_kernels.{name}") is not None


def test_every_kernel_is_tried_where_it_is_audited() -> None:
    for name, subject in SUBJECTS.items():
        assert {target for target in (80, 90, 100) if target in subject.targets} == set(KERNELS[name].targets), name
        assert subject.gluon == (KERNELS[name].implementation == "gluon")
        assert subject.elsewhere == (STAND_IN if subject.gluon else INTERPRETER)


def test_names() -> None:
    assert [s.kernel for s in subjects_of(["fa2", "fa1", "fa2"])] == ["fa2", "fa1"]
    assert [s.kernel for s in subjects_of([])] == list(SUBJECTS)
    with pytest.raises(InputError) as caught:
        subjects_of(["fa22", "fa1", "x"])
    assert len(caught.value.problems) == 2
    assert "did you mean 'fa2'?" in caught.value.problems[0]


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(SUBJECTS)))
def test_what_is_tried_on_a_gpu(data: st.DataObject, name: str) -> None:
    """Few head dims, dtypes and masks together, since each is compiled; tiles as they ship, so that none is given."""
    subject = SUBJECTS[name]
    trial = data.draw(subject.trials(CUDA))
    p = trial.case.problem
    assert (p.head_dim, p.head_dim_v, p.dtype) in {shape[:3] for shape in SHAPES}
    assert p.mask.partition(":")[0] in subject.masks
    assert not {"BLOCK_M", "BLOCK_N"} & set(trial.options)
    assert max(p.seqlen_q, p.seqlen_k) <= 1281
    assert trial.layout.order.endswith("d")
    assert (trial.layout.offset % subject.alignment, trial.layout.row_padding % subject.alignment) == (0, 0)


def test_long_problems_are_tried_on_a_gpu() -> None:
    longest = []

    @settings(max_examples=60)
    @given(SUBJECTS["fa2"].trials(CUDA))
    def look(trial: Trial) -> None:
        longest.append(min(trial.case.problem.seqlen_q, trial.case.problem.seqlen_k))

    look()
    assert max(longest) > 512


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(SUBJECTS)))
def test_what_is_tried_without_a_gpu(data: st.DataObject, name: str) -> None:
    subject = SUBJECTS[name]
    trial = data.draw(subject.trials(subject.elsewhere))
    assert trial.case.problem.flops <= exactness.SMALL_FLOPS
    assert set(trial.options) == {*subject.options, *subject.small}
    namespace = {"Trial": Trial, "AttentionCase": AttentionCase, "AttentionProblem": AttentionProblem, "Layout": Layout}
    assert eval(repr(trial), namespace) == trial


@pytest.mark.parametrize(
    ("mask", "arguments"),
    [("full", {}), ("causal", {"causal": True}), ("window:3", {"window": (3, 0)}), ("window:3,4", {"window": (3, 4)})],
)
def test_masks(mask: str, arguments: dict[str, Any]) -> None:
    assert mask_arguments(mask) == arguments


def test_outputs_are_poisoned() -> None:
    before = torch.empty
    with poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.float16)).isnan().all()
        assert torch.ones(1).new_empty(2).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty is before


def tried(monkeypatch: pytest.MonkeyPatch, check: Callable[[Trial, str], None], examples: int = 30) -> dict[str, Any]:
    """The last report of a kernel that is made up."""
    subject = replace(SUBJECTS["fa2"], kernel="mine", check=check)
    monkeypatch.setitem(SUBJECTS, "mine", subject)
    asked = {"kernel": "mine", "place": STAND_IN, "examples": examples, "seed": 0}
    return list(work(asked))[-1]


def test_a_kernel_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    report = tried(monkeypatch, lambda trial, device: devices.append(device))
    assert report == {"examples": 30, "failure": None}
    assert set(devices) == {"cpu"}


def test_the_smallest_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(trial: Trial, device: str) -> None:
        assert trial.case.problem.seqlen_k < 10, "wrong beyond nine keys"

    report = tried(monkeypatch, check)
    failure = report["failure"]
    assert report["examples"] < 30
    assert failure["kind"] == "NotAccepted"
    assert failure["message"].startswith("wrong beyond nine keys")
    assert (failure["problem"]["seqlen_q"], failure["problem"]["seqlen_k"]) == (1, 10)
    assert "seqlen_k=10" in failure["trial"]


def test_an_exception_is_a_failure_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(trial: Trial, device: str) -> None:
        raise IndexError("beyond")

    failure = tried(monkeypatch, check)["failure"]
    assert (failure["kind"], failure["message"]) == ("IndexError", "beyond")


def test_a_broken_context_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def check(trial: Trial, device: str) -> None:
        calls.append(trial)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    failure = tried(monkeypatch, check)["failure"]
    assert failure["kind"] == "RuntimeError"
    assert len({repr(trial) for trial in calls}) == 1


def test_the_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "SHRINKING_S", 0.0)
    calls = []

    def check(trial: Trial, device: str) -> None:
        calls.append(repr(trial))
        assert trial.case.problem.seqlen_k < 10

    assert tried(monkeypatch, check)["failure"]["kind"] == "NotAccepted"
    assert len(calls) < 30
