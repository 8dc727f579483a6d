"""Kernels with dropout: what is drawn, which bits a case has, and that the assertions hold results against them."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from testing_doc import FILES, kernel

from flashsim.errors import InputError
from flashsim.numerics.gradients import attention_gradients_reference
from flashsim.numerics.philox import SEED, keep
from flashsim.numerics.reference import attention_reference
from flashsim.problem import AttentionProblem
from flashsim.testing import (
    AttentionCase,
    assert_attention_close,
    assert_gradients_close,
    attention_cases,
    attention_problems,
)

Array = NDArray[Any]
CODE = FILES["my_attention.py"]
KERNEL = [
    ("def my_attention(q, k, v, causal):", "def my_attention(q, k, v, causal, kept, p):"),
    ("p, alpha = np.exp(s - safe)", "e, alpha = np.exp(s - safe)"),
    ("total * alpha + p.sum(", "total * alpha + e.sum("),
    ("p.astype(dtype)", "(e * kept[:, :, :, keys] / np.float32(1 - p)).astype(dtype)"),
]
"""The kernel of the documentation, with dropout."""
BUGS = {
    "no dropout": ("e * kept[:, :, :, keys] / np.float32(1 - p)", "e"),
    "not rescaled": (" / np.float32(1 - p)", ""),
    "rescaled twice": (" / np.float32(1 - p)", " / np.float32((1 - p) ** 2)"),
    "dropped before the sum": ("total * alpha + e.sum(", "total * alpha + (e * kept[:, :, :, keys]).sum("),
    "keep and drop swapped": ("e * kept[:, :, :, keys]", "e * ~kept[:, :, :, keys]"),
    "bits of another head": ("kept[:, :, :, keys]", "kept[:, ::-1][:, :, :, keys]"),
    "bits of the first tile": ("kept[:, :, :, keys]", "kept[:, :, :, keys - start]"),
}
P = (0.1, 0.5)
SMALL: Any = {"max_flops": 2e6}


def with_dropout(*more: tuple[str, str]) -> Any:
    code = CODE
    for old, new in (*KERNEL, *more):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return kernel(code)


def computed(function: Any, case: AttentionCase) -> Array:
    o: Array = function(*case.numpy(), case.causal, case.keep(), case.dropout)
    return o


@settings(max_examples=settings().max_examples // 2)
@given(attention_cases(dropout=(0.0, *P), **SMALL))
def test_a_correct_kernel_is_accepted(case: AttentionCase) -> None:
    assert_attention_close(computed(with_dropout(), case), case)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    wrong = with_dropout(BUGS[bug])

    @settings(max_examples=50, phases=[Phase.generate], derandomize=True, database=None)
    @given(attention_cases(dropout=P, **SMALL))
    def judge(case: AttentionCase) -> None:
        with np.errstate(all="ignore"):
            assert_attention_close(computed(wrong, case), case)

    with pytest.raises(AssertionError, match="the result is not attention"):
        judge()


CASE = AttentionCase(
    AttentionProblem(
        batch=2, heads_q=2, heads_kv=1, seqlen_q=9, seqlen_k=11, head_dim=16, head_dim_v=8, mask="causal", dropout=0.25
    ),
    seed=3,
)


def test_the_bits_of_a_case() -> None:
    """Those of `philox.keep`, for a seed of the case's own that fits a signed argument."""
    assert CASE.dropout == 0.25
    assert CASE.dropout_seed == SEED + 3
    expected = [[keep(np.arange(9), np.arange(11), b, h, 0.25, SEED + 3) for h in range(2)] for b in range(2)]
    np.testing.assert_array_equal(CASE.keep(), expected)
    seeds = {AttentionCase(CASE.problem, seed=seed).dropout_seed for seed in (0, 1, 2**16 - 1, 2**62)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    plain = AttentionProblem(batch=1, heads_q=1, seqlen_q=3, head_dim=16)
    assert AttentionCase(plain).keep().all()
    assert eval(repr(CASE), {"AttentionCase": AttentionCase, "AttentionProblem": AttentionProblem}) == CASE


def message(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_a_result_is_held_against_the_case_s_bits() -> None:
    drop: Any = {"dropout": 0.25, "dropout_seed": CASE.dropout_seed}
    o, lse = attention_reference(*CASE.qkv, "causal", **drop)
    gradients = attention_gradients_reference(*CASE.qkv, CASE.do, "causal", **drop)
    assert_attention_close(o, CASE, lse=lse)
    assert_gradients_close(gradients, CASE)
    other, _ = attention_reference(*CASE.qkv, "causal", dropout=0.25, dropout_seed=CASE.dropout_seed + 1)
    header = f"(fp16, mask causal, dropout 0.25, dropout_seed {SEED + 3}, "
    assert header + "o (2, 9, 2, 8))" in message(assert_attention_close, other, CASE)
    plain = attention_gradients_reference(*CASE.qkv, CASE.do, "causal")
    text = message(assert_gradients_close, plain, CASE)
    assert header + "dq (2, 9, 2, 16))" in text
    assert all(f"- {name}: largest error" in text for name in ("dq", "dk", "dv"))


def test_the_bits_of_the_backward_pass_alone() -> None:
    """dV from other bits, dQ and dK from the right ones: only dV is wrong; and the other way round."""
    right, wrong = (
        attention_gradients_reference(*CASE.qkv, CASE.do, "causal", dropout=0.25, dropout_seed=CASE.dropout_seed + n)
        for n in (0, 1)
    )
    text = message(assert_gradients_close, (right.dq, right.dk, wrong.dv), CASE)
    assert "- dv: largest" in text
    assert "- dq" not in text
    text = message(assert_gradients_close, (wrong.dq, right.dk, right.dv), CASE)
    assert "- dq: largest" in text
    assert "- dv" not in text


def test_nothing_is_forgiven_where_everything_is_dropped() -> None:
    """Bounds are those of the same bits: O and its gradients are 0, and numbers that rounding could make are wrong."""
    case = AttentionCase(AttentionProblem(batch=1, heads_q=1, seqlen_q=4, head_dim=16, dropout=0.999))
    assert not case.keep().any()
    nothing = np.zeros((1, 4, 1, 16))
    assert_attention_close(nothing, case)
    assert_gradients_close([nothing] * 3, case)
    assert "- O: largest error 1e-05" in message(assert_attention_close, nothing + 1e-5, case)
    text = message(assert_gradients_close, [nothing + 1e-5] * 3, case)
    assert all(f"- {name}: largest error 1e-05" in text for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("seed", [None, 5])
def test_arrays_instead_of_a_case(seed: int | None) -> None:
    drop: Any = {"dropout": 0.25, "dropout_seed": SEED if seed is None else seed}
    o, lse = attention_reference(*CASE.qkv, "causal", **drop)
    given_: Any = {"mask": "causal", "dtype": "fp16", "dropout": 0.25}
    if seed is not None:
        given_["dropout_seed"] = seed
    assert_attention_close(o, *CASE.qkv, lse=lse, **given_)
    gradients = attention_gradients_reference(*CASE.qkv, CASE.do, "causal", **drop)
    assert_gradients_close(gradients, *CASE.qkv, CASE.do, **given_)
    for changed in ({"dropout": None}, {"dropout_seed": 6}, {"dropout": 0.26}):
        assert "largest error" in message(assert_attention_close, o, *CASE.qkv, **(given_ | changed))
        assert "largest error" in message(assert_gradients_close, gradients, *CASE.qkv, CASE.do, **(given_ | changed))


def test_mistakes_of_the_caller() -> None:
    q, k, v = CASE.qkv
    for call, arguments in ((assert_attention_close, (q, k, v)), (assert_gradients_close, (q, k, v, CASE.do))):
        with pytest.raises(InputError) as caught:
            call(None, *arguments, dtype="fp16", mask="casual", dropout=1.0, dropout_seed=0.5)  # type: ignore[operator]
        assert [line.partition(":")[0] for line in caught.value.problems] == ["mask", "dropout", "dropout_seed"]
        with pytest.raises(InputError) as caught:
            call(None, CASE, dropout=0.0, dropout_seed=0)  # type: ignore[operator]
        assert caught.value.problems == (
            "dropout: comes with the case, and cannot be given",
            "dropout_seed: comes with the case, and cannot be given",
        )


@settings(max_examples=settings().max_examples // 5)
@given(st.data())
def test_dropout_is_drawn_where_it_is_asked_for(data: st.DataObject) -> None:
    assert data.draw(attention_problems()).dropout == 0
    assert data.draw(attention_cases(dropout=[0.25])).dropout == 0.25
    assert data.draw(attention_problems(dropout=(0.0, 0.1, 0.9))).dropout in (0, 0.1, 0.9)


def test_failures_shrink_to_the_first() -> None:
    few = settings(max_examples=200, database=None, deadline=None)
    drawn = attention_problems(dropout=(0.5, 0.0, 0.1))
    assert find(drawn, lambda p: p.seqlen_k > 1, random=Random(0), settings=few).dropout == 0.5
    assert find(drawn, lambda p: p.dropout == 0.1, random=Random(0), settings=few).seqlen_k == 1


def test_probabilities_that_are_none() -> None:
    with pytest.raises(InputError) as caught:
        attention_problems(dropout=(0.1, 1.0, "0"), masks=())  # type: ignore[arg-type]
    assert caught.value.problems == (
        "masks: got (), must name at least one, in a list or tuple",
        "dropout: got 1.0, must be a number in [0, 1)",
        "dropout: got '0', must be a number in [0, 1)",
    )
    for wrong in (0.1, (), "0.1", 0):
        with pytest.raises(InputError, match=r"dropout: got .*, must name at least one, in a list or tuple"):
            attention_cases(dropout=wrong)  # type: ignore[arg-type]
