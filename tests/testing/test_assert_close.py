"""`assert_attention_close` accepts a kernel that rounds as kernels do and rejects it with one bug, and says why."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from numpy.typing import NDArray
from testing_doc import FILES, kernel, my_attention

from flashsim.errors import InputError
from flashsim.numerics.reference import attention_reference
from flashsim.problem import AttentionProblem
from flashsim.testing import KINDS, AttentionCase, assert_attention_close, attention_cases

Array = NDArray[np.float64]
CODE = FILES["my_attention.py"]
WITH_LSE = (
    "    return np.moveaxis(o, 1, 2).astype(dtype)",
    '    with np.errstate(divide="ignore"):\n'
    "        lse = np.where(m == -np.inf, 0, m) + np.log(total)\n"
    "    return np.moveaxis(o, 1, 2).astype(dtype), lse[..., 0]",
)


def changed(*replacements: tuple[str, str]) -> Any:
    """The kernel of the documentation with some of its text replaced."""
    code = CODE
    for old, new in replacements:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return kernel(code)


@given(attention_cases())
def test_a_correct_kernel_is_accepted(case: AttentionCase) -> None:
    o, lse = changed(WITH_LSE)(*case.numpy(), causal=case.causal)
    assert o.dtype == case.numpy()[0].dtype
    assert lse.dtype == np.float32
    assert_attention_close(o, case, lse=lse)


BUGS = {
    "O is not rescaled": ("acc = acc * alpha", "acc = acc"),
    "l is not rescaled": ("total = total * alpha", "total = total"),
    "each block's own maximum, never rescaled": (
        "p, alpha = np.exp(s - safe), np.exp(m - safe)",
        "p, alpha = np.exp(s - s.max(axis=3, keepdims=True).clip(-1e9)), np.float32(1)",
    ),
    "the maximum starts at 0": ("np.float32(-np.inf), np.float32(0), np.float32(0)", "np.float32(0)," * 3),
    "not scaled": ("* np.float32(q.shape[3] ** -0.5)", ""),
    "scaled by the head dim of V": ("np.float32(q.shape[3] ** -0.5)", "np.float32(v.shape[3] ** -0.5)"),
    "causal, one key too many": ("+ seqlen_k - seqlen_q", "+ seqlen_k - seqlen_q + 1"),
    "causal, one key too few": ("+ seqlen_k - seqlen_q", "+ seqlen_k - seqlen_q - 1"),
    "causal, aligned at the top left": ("+ seqlen_k - seqlen_q", ""),
    "masked scores are -1e4": ("s = np.where(seen, s, np.float32(-np.inf))", "s = np.where(seen, s, np.float32(-1e4))"),
    "KV heads interleaved": ("np.repeat(x, group, axis=1)", "np.tile(x, (1, group, 1, 1))"),
    "the last tile is left out": ("range(0, seqlen_k, BLOCK_N)", "range(0, max(1, seqlen_k - BLOCK_N + 1), BLOCK_N)"),
    "the last key twice": (
        "np.arange(start, min(start + BLOCK_N, seqlen_k))",
        "np.minimum(np.arange(start, start + BLOCK_N), seqlen_k - 1)",
    ),
    "P in fp8": ("p.astype(dtype)", 'p.astype("float8_e4m3fn")'),
    "scores in fp16 before they are scaled": (
        "q @ np.swapaxes(k[:, :, keys], 2, 3)", "(q @ np.swapaxes(k[:, :, keys], 2, 3)).astype(np.float16)"
    ),
    "not divided": ("acc / np.where(total > 0, total, 1)", "acc"),
    "a row without keys is NaN": ("np.where(total > 0, total, 1), 0)", "np.where(total > 0, total, 1), np.nan)"),
    "batches exchanged": ("return np.moveaxis(o, 1, 2)", "return np.moveaxis(o, 1, 2)[::-1]"),
    "heads exchanged": ("return np.moveaxis(o, 1, 2)", "return np.moveaxis(o[:, ::-1], 1, 2)"),
    "heads and rows exchanged": ("np.moveaxis(o, 1, 2)", "o.reshape(np.moveaxis(o, 1, 2).shape)"),
    "zeros": ("acc / np.where(total > 0, total, 1)", "0 * acc"),
}  # fmt: skip


FEW = 50
"""Derandomized: more examples in a long run are no better reason to call a bug found."""


def is_found(attention: Any, kinds: tuple[str, ...] = KINDS, examples: int = FEW) -> bool:
    """Whether the assertion rejects O, or LSE if there is one, in one of the first `examples` cases."""

    @settings(max_examples=examples, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
    @given(attention_cases(kinds=kinds))
    def judge(case: AttentionCase) -> None:
        with np.errstate(all="ignore"):
            result = attention(*case.numpy(), causal=case.causal)
        o, lse = result if isinstance(result, tuple) else (result, None)
        assert_attention_close(o, case, lse=lse)

    try:
        judge()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    assert is_found(changed(BUGS[bug]))


L_IN_LOW_PRECISION = (
    "total = total * alpha + p.sum(axis=3, keepdims=True)",
    "total = (total * alpha + p.sum(axis=3, keepdims=True)).astype(dtype).astype(np.float32)",
)
O_IN_LOW_PRECISION = ("@ v[:, :, keys]", "@ v[:, :, keys]\n        acc = acc.astype(dtype)")


def test_one_more_rounding_is_found_where_it_adds_up() -> None:
    """In the LSE at once; in O, which is rounded once anyway, only over very many tiles."""
    assert is_found(changed(WITH_LSE, L_IN_LOW_PRECISION))
    one_key = ("BLOCK_N = 32", "BLOCK_N = 1")
    assert is_found(changed(one_key, O_IN_LOW_PRECISION))
    assert not is_found(changed(one_key))


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        ("the maximum starts at 0", "negative_rows"),
        ("scores in fp16 before they are scaled", "huge_scores"),
    ],
)
def test_some_bugs_need_their_kind_of_values(bug: str, kind: str) -> None:
    attention = changed(BUGS[bug])
    assert not is_found(attention, ("normal", "ones"), examples=20)
    assert is_found(attention, (kind,), examples=20)


def case_of(kind: str = "normal", dtype: str = "fp16", mask: str = "causal") -> AttentionCase:
    return AttentionCase(
        AttentionProblem(
            batch=2, heads_q=4, heads_kv=2, seqlen_q=40, seqlen_k=60, head_dim=32, head_dim_v=16, mask=mask, dtype=dtype
        ),
        kind,
    )


ROUNDED_COARSELY = ("huge_scores", "negative_rows")
"""Scores of hundreds and more: eager attention rounds them to the dtype, and is a coarse ruler."""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_makes_the_rule_blind(kind: str, dtype: str) -> None:
    """Whatever differs from the reference by more than rounding is rejected."""
    case = case_of(kind, dtype)
    o, _ = attention_reference(*case.qkv, case.mask)
    assert_attention_close(o, case)
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    wrong = {
        "zeros": np.zeros_like(o),
        "a third more": o * 4 / 3,
        "the row before": np.roll(o, 1, axis=1),
        "the head before": np.roll(o, 1, axis=2),
        "the column before": np.roll(o, 1, axis=3),
        "the mean of V": np.broadcast_to(np.repeat(case.v.mean(axis=1, keepdims=True), 2, axis=2), o.shape),
        "ten units in the last place": o * (1 + (1000 if kind in ROUNDED_COARSELY else 10) * unit),
    }
    differ = [name for name, mine in wrong.items() if np.abs(mine - o).mean() > unit * np.abs(o).mean()]
    accepted = [name for name in differ if not is_rejected(wrong[name], case)]
    assert accepted == []
    # With equal values in all of V, an element of O can be exchanged with any other one.
    assert len(differ) == {"zeros": 0, "constant": 3}.get(kind, 7)


def is_rejected(o: Array, case: AttentionCase) -> bool:
    try:
        assert_attention_close(o, case)
    except AssertionError:
        return True
    return False


# What it says.


def message(o: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_attention_close(o, *arguments, **options)
    return str(caught.value)


def exact() -> tuple[AttentionCase, Array, Array]:
    case = case_of()
    o, lse = attention_reference(*case.qkv, case.mask)
    return case, o, lse


def test_one_wrong_element() -> None:
    case, o, _ = exact()
    expected = o[1, 3, 2, 7]
    o[1, 3, 2, 7] += 0.25
    header, largest, where = message(o, case).splitlines()
    assert header == "the result is not attention (fp16, mask causal, o (2, 40, 4, 16))"
    assert largest.startswith("- O: largest error 0.25, allowed 0.00")
    assert largest.endswith(", in 1 of 5120 elements")
    assert where == f"    worst at batch 1, row 3, head 2, column 7: got {expected + 0.25:.7g}, expected {expected:.7g}"


def test_the_first_nan_is_named() -> None:
    case, o, lse = exact()
    o[1, 3, 2, 7:], lse[0, 3, 5] = np.nan, np.nan
    text = message(o, case, lse=lse)
    assert "- O: largest error inf, allowed 0.00" in text
    assert "    9 NaN, the first at batch 1, row 3, head 2, column 7: got nan, expected" in text
    assert "- LSE: error / tolerance inf, allowed 1" in text
    assert "    1 NaN, the first at batch 0, head 3, row 5: got nan, expected" in text


def test_infinity() -> None:
    case, o, lse = exact()
    o[0, 1, 2, 3], lse[0, 3, 5] = np.inf, -np.inf
    text = message(o, case, lse=lse)
    assert "- O: largest error inf, allowed 0.00" in text
    assert "worst at batch 0, row 1, head 2, column 3: got inf" in text
    assert "worst at batch 0, head 3, row 5: got -inf" in text


def test_errors_that_are_small_and_many() -> None:
    """Below what the largest error may be, everywhere: only the mean tells."""
    case, o, _ = exact()
    text = message(o + 5e-4, case)
    assert "- O: mean error 0.0005, allowed 0.000" in text
    assert "largest" not in text


def test_zeros_are_named() -> None:
    """The largest of them; an element that is wrong by more is not zero."""
    case, o, _ = exact()
    expected = f"{np.abs(o).max():.7g}"
    place = "batch {}, row {}, head {}, column {}".format(*np.unravel_index(np.abs(o).argmax(), o.shape))
    o[1, 3, 2, 7] = o[np.abs(o) == np.abs(o).max()] = 0
    o[0, 0, 0, 0] += 100
    largest, where, mean, zeros, where_zero = message(o, case).splitlines()[1:]
    assert largest.startswith("- O: largest error 100, allowed 0.00")
    assert where.startswith("    worst at batch 0, row 0, head 0, column 0: got 99.")
    assert mean.startswith("- O: mean error 0.0")
    assert zeros == "- O: zeros where the reference is not 2, allowed 0"
    assert where_zero.startswith(f"    worst at {place}: got 0, expected ")
    assert where_zero.endswith(expected)


def test_lse() -> None:
    case, o, lse = exact()
    assert_attention_close(o, case, lse=lse)
    assert_attention_close(o, case, lse=lse.astype(np.float32))
    wrong = lse.copy()
    wrong[1, 2, 30] += 1e-3
    header, error, where = message(o, case, lse=wrong).splitlines()
    assert header.startswith("the result is not attention")
    assert error.startswith("- LSE: error / tolerance ")
    assert error.endswith(", allowed 1")
    assert where.startswith("    worst at batch 1, head 2, row 30: got ")
    assert "LSE: error" in message(o, case, lse=lse / np.log(2))
    assert "LSE: error" in message(o, case, lse=np.zeros_like(lse))


def test_rows_without_keys() -> None:
    q, k, v = (np.ones((1, n, 1, 8)) for n in (3, 1, 1))
    o, lse = np.where(np.arange(3) == 2, 1, 0)[None, :, None, None] * v, np.full((1, 1, 3), -np.inf)
    lse[0, 0, 2] = 8**0.5
    assert_attention_close(o, q, k, v, dtype="bf16", mask="causal", lse=lse)
    other = np.where(np.isinf(lse), np.inf, lse)
    assert "got inf, expected -inf" in message(o, q, k, v, dtype="bf16", mask="causal", lse=other)
    assert "row 0, head 0, column 0: got 1, expected 0" in message(o + (o == 0), q, k, v, dtype="bf16", mask="causal")


def test_shapes() -> None:
    case, o, lse = exact()
    assert message(o[:, :-1], case) == (
        "o has shape (2, 39, 4, 16), and must have (2, 40, 4, 16), which is (batch, seqlen, heads, head_dim)"
    )
    assert message(o.transpose(0, 2, 1, 3), case).endswith("; seqlen and heads are exchanged")
    assert message(o, case, lse=lse.transpose(0, 2, 1)) == (
        "lse has shape (2, 40, 4), and must have (2, 4, 40), which is (batch, heads, seqlen); "
        "seqlen and heads are exchanged"
    )
    assert message(o, case, lse=0.0).startswith("lse has shape ()")


@pytest.mark.parametrize("o", [None, "text", {}, object(), [[1], [1, 2]], (np.zeros(2), np.zeros(3)), 1j * np.ones(2)])
def test_a_result_that_is_no_array(o: object) -> None:
    assert message(o, case_of()).startswith("o is no array of numbers: got ")


# What it takes.


def test_arrays_instead_of_a_case() -> None:
    case, o, lse = exact()
    for qkv, mine in ((case.qkv, o.astype(np.float16)), (case.numpy(), o), ([x.tolist() for x in case.numpy()], None)):
        given_o, options = (o, {"dtype": "fp16"}) if mine is None else (mine, {})
        assert_attention_close(given_o, *qkv, mask="causal", lse=lse, **options)
        assert "largest error" in message(given_o, *qkv, mask="full", **options)


def test_scale() -> None:
    case = case_of()
    o, lse = attention_reference(*case.qkv, "causal", 0.3)
    assert_attention_close(o, case, lse=lse, scale=0.3)
    assert_attention_close(o, *case.qkv, lse=lse, scale=0.3, mask="causal", dtype="fp16")
    assert "largest error" in message(o, case)


class FromAnotherLibrary:
    """As jax's arrays: `__array__`, and a dtype that NumPy does not have by itself."""

    def __init__(self, values: Array) -> None:
        self.values = values.astype(ml_dtypes.bfloat16)
        self.dtype = self.values.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.values if dtype is None else self.values.astype(dtype)


def test_arrays_of_other_libraries() -> None:
    case = case_of(dtype="bf16")
    o = my_attention(*case.numpy(), causal=True)
    assert_attention_close(FromAnotherLibrary(o.astype(float)), *map(FromAnotherLibrary, case.qkv), mask="causal")
    with pytest.raises(AssertionError, match=r"^the result is not attention \(bf16"):
        assert_attention_close(FromAnotherLibrary(2 * o.astype(float)), *map(FromAnotherLibrary, case.qkv))


def mistakes(*arguments: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        assert_attention_close(*arguments, **options)
    return caught.value.problems


def test_mistakes_of_the_caller() -> None:
    case, o, _ = exact()
    q, k, v = case.qkv
    bad = k.copy()
    bad[1, 2, 0, 3] = np.nan
    assert mistakes(o, q * 1.001, bad[:1], "v", dtype="fp61", mask="casual", scale=np.inf) == (
        "dtype: unknown dtype 'fp61', did you mean 'fp16'? (allowed: fp16, bf16, fp32)",
        "mask: unknown mask 'casual', did you mean 'causal'? (allowed: full, causal, window, prefix, chunked, "
        "documents, global, blocks, butterfly, padding, varlen, varlen-causal)",
        "v: must be an array of numbers, got str with elements of type <U1",
    )
    assert mistakes(o, q, bad, v, dtype="fp16", scale=np.inf) == (
        "k: must be finite, and is nan at (1, 2, 0, 3)",
        "scale: must be finite, got inf",
    )
    finer = v.copy()
    finer[0, 1, 0, :2] = 1 + 2.0**-11
    assert mistakes(o, q, k, finer, dtype="fp16") == (
        "v: 2 of 3840 values are none of fp16, such as 1.00048828125; give what the kernel reads",
    )
    assert mistakes(o, q, k[:1], v, dtype="fp16") == ("k: batch 1 differs from 2 of q",)
    assert mistakes(o, case, k, dtype="fp16") == (
        "k: comes with the case, and cannot be given",
        "dtype: comes with the case, and cannot be given",
    )


def test_the_dtype_is_that_of_the_arrays_or_must_be_given() -> None:
    case, o, _ = exact()
    q, k, v = case.numpy()
    assert mistakes(o, *case.qkv) == (
        "dtype: must be given (allowed: fp16, bf16, fp32), since the arrays do not say: "
        "q float64, k float64, v float64, o float64",
    )
    assert mistakes(o, q, k.astype(np.float32), v)[0].endswith("q float16, k float32, v float16, o float64")
    assert mistakes(o, q, k, v.astype(ml_dtypes.bfloat16))[0].startswith("dtype: must be given")
    # fp16 inputs and a bf16 result: fp16 is what the result is held to.
    assert "fp16" in message(o.astype(ml_dtypes.bfloat16), q, k, v, mask="causal")


def in_fp32(case: AttentionCase) -> list[NDArray[np.float32]]:
    """q, k, v with all bits of fp32."""
    return [(x * 1.1).astype(np.float32) for x in case.qkv]


@given(attention_cases())
def test_a_correct_kernel_in_fp32_is_accepted(case: AttentionCase) -> None:
    q, k, v = in_fp32(case)
    o, lse = changed(WITH_LSE)(q, k, v, causal=case.causal)
    assert_attention_close(o, q, k, v, dtype="fp32", mask=case.mask, lse=lse)


def test_products_in_tf32_are_not_fp32() -> None:
    q, k, v = in_fp32(case_of())
    rounded = [np.round(x * 2**9) / 2**9 for x in (q, k, v)]
    o = changed()(*(x.astype(np.float32) for x in rounded), causal=True)
    assert "- O: largest error" in message(o, q, k, v, dtype="fp32", mask="causal")


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_empty_sequences(sizes: tuple[int, int]) -> None:
    q, k, v = (np.ones((1, n, 1, 4)) for n in (sizes[0], sizes[1], sizes[1]))
    o = np.zeros((1, sizes[0], 1, 4))
    assert_attention_close(o, q, k, v, dtype="bf16", lse=np.full((1, 1, sizes[0]), -np.inf))
    if o.size:
        assert "NaN, the first" in message(o * np.nan, q, k, v, dtype="bf16")
