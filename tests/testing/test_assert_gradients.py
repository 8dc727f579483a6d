"""`assert_gradients_close` accepts FlashAttention-2's backward pass, rejects it with one bug, and says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.numerics.gradients import attention_gradients_reference
from flashsim.problem import AttentionProblem
from flashsim.testing import AttentionCase, assert_gradients_close, attention_cases

Array = NDArray[Any]

BACKWARD = '''
def backward(q, k, v, do, causal):
    """Algorithm 2 of FlashAttention-2 in one tile: O, P, dS and the results in the dtype of q, the rest in fp32."""
    dtype, heads_kv, group = q.dtype, k.shape[2], q.shape[2] // k.shape[2]
    q, k, v, do = (np.moveaxis(x, 2, 1).astype(np.float32) for x in (q, k, v, do))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = np.float32(q.shape[3] ** -0.5)
    s = q @ np.swapaxes(k, 2, 3) * scale
    if causal:
        s = np.where(np.tri(*s.shape[2:], s.shape[3] - s.shape[2], dtype=bool), s, -np.inf)
    m = s.max(axis=3, keepdims=True)
    p = np.exp(s - np.where(m == -np.inf, 0, m))
    p = p / np.maximum(p.sum(axis=3, keepdims=True), 1e-30)
    o = (p @ v).astype(dtype).astype(np.float32)
    dp = do @ np.swapaxes(v, 2, 3)
    ds = p * (dp - np.sum(do * o, axis=3, keepdims=True))
    p, ds = (x.astype(dtype).astype(np.float32) for x in (p, ds))
    dq, dk, dv = ds @ k * scale, np.swapaxes(ds, 2, 3) @ q * scale, np.swapaxes(p, 2, 3) @ do
    dk, dv = (x.reshape(x.shape[0], heads_kv, group, *x.shape[2:]).sum(axis=2) for x in (dk, dv))
    return [np.moveaxis(x, 1, 2).astype(dtype) for x in (dq, dk, dv)]
'''
BUGS = {
    "without rowsum(dO * O)": ("(dp - np.sum(do * o, axis=3, keepdims=True))", "dp"),
    "dQ not scaled": ("dq, dk, dv = ds @ k * scale", "dq, dk, dv = ds @ k"),
    "dK not scaled": ("@ q * scale", "@ q"),
    "dP from dO and O": ("dp = do @ np.swapaxes(v, 2, 3)", "dp = o @ np.swapaxes(v, 2, 3)"),
    "P is not normalized": ("p = p / np.maximum(p.sum(axis=3, keepdims=True), 1e-30)\n    o = (p @ v)", (
        "o = (p @ v / np.maximum(p.sum(axis=3, keepdims=True), 1e-30))"
    )),
    "one head of a group only": (".sum(axis=2) for", "[:, :, 0] for"),
    "the mean of a group": (".sum(axis=2) for", ".mean(axis=2) for"),
    "causal off by one": ("s.shape[3] - s.shape[2],", "s.shape[3] - s.shape[2] + 1,"),
    "dV of the values before": ("np.swapaxes(p, 2, 3) @ do", "np.roll(np.swapaxes(p, 2, 3) @ do, 1, axis=2)"),
    "dS in fp8": ("for x in (p, ds))\n    dq", 'for x in (p, ds.astype("float8_e4m3fn")))\n    dq'),
    "zeros": ("return [np.moveaxis(x, 1, 2)", "return [np.zeros_like(np.moveaxis(x, 1, 2))"),
}  # fmt: skip


def backward(*change: str) -> Any:
    code = BACKWARD
    if change:
        assert code.count(change[0]) == 1
        code = code.replace(*change)
    names: dict[str, Any] = {"np": np}
    exec(compile(code, "backward.py", "exec"), names)
    return names["backward"]


def gradients_of(case: AttentionCase, function: Any) -> list[Array]:
    with np.errstate(all="ignore"):
        gradients: list[Array] = function(*case.numpy(), case.numpy_do(), case.causal)
    return gradients


@settings(max_examples=settings().max_examples // 2)
@given(attention_cases(max_flops=2e6))
def test_a_correct_backward_pass_is_accepted(case: AttentionCase) -> None:
    assert_gradients_close(gradients_of(case, backward()), case)


@settings(max_examples=settings().max_examples // 4)
@given(attention_cases(max_flops=2e6))
def test_a_correct_backward_pass_in_fp32_is_accepted(case: AttentionCase) -> None:
    q, k, v, do = ((x * 1.1).astype(np.float32) for x in (*case.qkv, case.do))
    with np.errstate(invalid="ignore"):
        gradients = backward()(q, k, v, do, case.causal)
    assert_gradients_close(gradients, q, k, v, do, dtype="fp32", mask=case.mask)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    wrong = backward(*BUGS[bug])

    @settings(max_examples=50, phases=[Phase.generate], derandomize=True, database=None)
    @given(attention_cases(max_flops=2e6))
    def judge(case: AttentionCase) -> None:
        assert_gradients_close(gradients_of(case, wrong), case)

    with pytest.raises(AssertionError, match="these are not the gradients of attention"):
        judge()


CASE = AttentionCase(
    AttentionProblem(batch=1, heads_q=2, heads_kv=1, seqlen_q=7, seqlen_k=9, head_dim=16, head_dim_v=8)
)


def exact() -> list[Array]:
    return list(attention_gradients_reference(*CASE.qkv, CASE.do))


def message(gradients: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_gradients_close(gradients, CASE)
    return str(caught.value)


def test_the_message() -> None:
    dq, dk, dv = exact()
    assert_gradients_close([dq, dk, dv], CASE)
    expected = dk[0, 3, 0, 5]
    dk[0, 3, 0, 5] += 1
    dv[0, 8, 0, 7] = np.nan
    lines = message((dq, dk, dv)).splitlines()
    assert lines[0] == "these are not the gradients of attention (fp16, mask full, dq (1, 7, 2, 16))"
    assert lines[1].startswith("- dk: largest error 1, allowed 0.0")
    assert lines[2] == f"    worst at batch 0, key 3, head 0, column 5: got {expected + 1:.7g}, expected {expected:.7g}"
    assert "    1 NaN, the first at batch 0, key 8, head 0, column 7: got nan" in "\n".join(lines)


def test_results_that_are_no_gradients() -> None:
    dq, dk, dv = exact()
    assert message([dq, dk]) == "gradients must be dq, dk and dv, got 2 of them"
    assert message(dq).startswith("gradients must be dq, dk and dv, got ndarray")
    assert message([dq, np.repeat(dk, 2, axis=2), dv]).startswith(
        "dk has shape (1, 9, 2, 16), and must have (1, 9, 1, 16)"
    )
    assert message([dq, dk, None]) == "dv is no array of numbers: got NoneType with elements of type object"


def test_arrays_instead_of_a_case() -> None:
    assert_gradients_close(exact(), *CASE.numpy(), CASE.numpy_do())
    q, k, v = CASE.qkv
    with pytest.raises(InputError, match=r"do: must have the shape of o, \(1, 7, 2, 8\), got \(1, 7, 2, 7\)"):
        assert_gradients_close(exact(), q, k, v, CASE.do[..., :7], dtype="fp16")
    with pytest.raises(InputError, match="do: comes with the case"):
        assert_gradients_close(exact(), CASE, do=CASE.do)  # type: ignore[call-overload]


def test_do_is_independent_of_the_inputs() -> None:
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=200, head_dim=64, dtype="bf16")
    case = AttentionCase(problem, seed=3)
    assert case.do.shape == (1, 200, 1, 64)
    assert 0.95 < case.do.std() < 1.05
    assert all(abs(np.corrcoef(case.do.ravel(), x.ravel())[0, 1]) < 0.05 for x in case.qkv)
    np.testing.assert_array_equal(case.numpy_do().astype(float), case.do)
    np.testing.assert_array_equal(AttentionCase(problem, "ones", seed=3).do, case.do)
