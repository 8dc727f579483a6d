"""Is what a kernel computed attention, or its gradients, as exactly as its dtype lets it be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, overload

from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.compare import Comparison, compare_gradients, forward_clauses
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.reference import attention_reference
from flashsim.testing.arguments import BHS, BSHD, check_arguments, check_result, of_case
from flashsim.testing.cases import AttentionCase
from flashsim.testing.explain import Computed, explain

ROWS = ("batch", "row", "head", "column")
KEYS = ("batch", "key", "head", "column")
LSE_AXES = ("batch", "head", "row")


class Dropout(TypedDict):
    """Keyword arguments of everything that a result is held against."""

    dropout: float
    dropout_seed: int


@overload
def assert_attention_close(o: Any, case: AttentionCase, /, *, lse: Any = None, scale: float | None = None) -> None: ...


@overload
def assert_attention_close(
    o: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    lse: Any = None,
    dtype: str | None = None,
    mask: str | None = None,
    scale: float | None = None,
    dropout: float | None = None,
    dropout_seed: int | None = None,
) -> None: ...


def assert_attention_close(
    o: Any,  # (B, Sq, Hq, Dv)
    q: Any,  # (B, Sq, Hq, D), or an AttentionCase
    k: Any = None,  # (B, Sk, Hkv, D)
    v: Any = None,  # (B, Sk, Hkv, Dv)
    *,
    lse: Any = None,  # (B, Hq, Sq)
    dtype: str | None = None,
    mask: str | None = None,
    scale: float | None = None,
    dropout: float | None = None,
    dropout_seed: int | None = None,
) -> None:
    """Raise AssertionError unless `o` is softmax(scale * Q K^T) V, as exact as unfused attention in the same dtype.

    The rule is `numerics.compare.forward_clauses`: against float64 attention, the largest error is at most twice, and
    the mean error 1.5 times, that of unfused attention in the same dtype, each plus a derived bound; elements are zero
    only where the reference is; all are finite. `lse`, if it is given, is the natural logarithm of the sum of
    exponentials of the scaled scores, and is held to 1e-5. The message says which rule is broken, by how much and where
    the worst element, or the first NaN, is.

    Arrays are NumPy's, jax's, torch tensors on any device, or anything else that `numpy.asarray` reads. Instead of
    q, k, v an `AttentionCase` can be given, which also has dtype, mask and dropout. q, k, v hold what the kernel read:
    a kernel that overwrites them defeats the comparison, a case is safe from that. `dtype` is fp16 or bf16, by default
    that of q, k, v, or of o where theirs is wider, or fp32, which must be given; `mask` is full (the default) or
    causal, aligned at the bottom right; a row that sees no key is 0 and its LSE -inf; `scale` defaults to 1 / sqrt(D).

    With `dropout` (a case's, or 0), O = (P * keep / (1 - dropout)) V with the bits of `numerics.philox.keep` for
    `dropout_seed` (`case.dropout_seed`, or `philox.SEED`); the LSE sums all keys, kept or not. Bits of another
    generator, or of other rows, keys or heads, make another result.

    Raises InputError, one line per mistake, for arguments that do not fit, that are not finite, or that the dtype
    cannot hold. A result of another shape is an AssertionError.
    """
    __tracebackhide__ = True
    if isinstance(q, AttentionCase):
        x = of_case(q, k=k, v=v, dtype=dtype, mask=mask, dropout=dropout, dropout_seed=dropout_seed)
    else:
        x = check_arguments({"q": q, "k": k, "v": v}, o, dtype, mask, scale, dropout, dropout_seed)
    drop: Dropout = {"dropout": x.dropout, "dropout_seed": x.dropout_seed}
    o_ref, lse_ref = attention_reference(x.q, x.k, x.v, x.mask, scale, **drop)
    mine = check_result("o", o, o_ref.shape, BSHD)
    mine_lse = lse_ref if lse is None else check_result("lse", lse, lse_ref.shape, BHS)
    eager = eager_attention(x.q, x.k, x.v, x.dtype, x.mask, scale, **drop)
    bounds = rounding_bounds(x.q, x.k, x.v, x.dtype, x.mask, scale, **drop)
    comparison = Comparison(forward_clauses(mine, mine_lse, o_ref, lse_ref, eager, bounds))
    if not comparison.accepted:
        tensors = {"O": Computed(mine, o_ref, ROWS), "LSE": Computed(mine_lse, lse_ref, LSE_AXES)}
        what = f"the result is not attention ({x.described}, o {mine.shape})"
        raise AssertionError(f"{what}\n{explain(comparison.broken, tensors)}")


@overload
def assert_gradients_close(gradients: Sequence[Any], case: AttentionCase, /, *, scale: float | None = None) -> None: ...


@overload
def assert_gradients_close(
    gradients: Sequence[Any],
    q: Any,
    k: Any,
    v: Any,
    do: Any,
    *,
    dtype: str | None = None,
    mask: str | None = None,
    scale: float | None = None,
    dropout: float | None = None,
    dropout_seed: int | None = None,
) -> None: ...


def assert_gradients_close(
    gradients: Sequence[Any],  # dq (B, Sq, Hq, D), dk (B, Sk, Hkv, D), dv (B, Sk, Hkv, Dv)
    q: Any,  # (B, Sq, Hq, D), or an AttentionCase
    k: Any = None,  # (B, Sk, Hkv, D)
    v: Any = None,  # (B, Sk, Hkv, Dv)
    do: Any = None,  # (B, Sq, Hq, Dv)
    *,
    dtype: str | None = None,
    mask: str | None = None,
    scale: float | None = None,
    dropout: float | None = None,
    dropout_seed: int | None = None,
) -> None:
    """Raise AssertionError unless dq, dk, dv are the gradients of sum(O * dO), as exact as unfused attention's.

    The rule is `numerics.compare.compare_gradients`: that for O, with 3 times the largest error of unfused attention's
    backward pass in the same dtype, for each gradient. A case brings its own dO, `case.do`. The rest is as in
    `assert_attention_close`; with dropout, O in sum(O * dO) is that of the same bits.
    """
    __tracebackhide__ = True
    if isinstance(q, AttentionCase):
        x = of_case(q, k=k, v=v, do=do, dtype=dtype, mask=mask, dropout=dropout, dropout_seed=dropout_seed)
    else:
        x = check_arguments({"q": q, "k": k, "v": v, "do": do}, None, dtype, mask, scale, dropout, dropout_seed)
    drop: Dropout = {"dropout": x.dropout, "dropout_seed": x.dropout_seed}
    reference = attention_gradients_reference(x.q, x.k, x.v, x.do, x.mask, scale, **drop)
    if not isinstance(gradients, Sequence) or len(gradients) != len(reference):
        got = f"{len(gradients)} of them" if isinstance(gradients, Sequence) else type(gradients).__name__
        raise AssertionError(f"gradients must be dq, dk and dv, got {got}")
    names = Gradients._fields
    mine = Gradients(
        *(check_result(*it, BSHD) for it in zip(names, gradients, (g.shape for g in reference), strict=True))
    )
    eager = eager_gradients(x.q, x.k, x.v, x.do, x.dtype, x.mask, scale, **drop)
    bounds = gradient_bounds(x.q, x.k, x.v, x.do, x.dtype, x.mask, scale, **drop)
    comparison = compare_gradients(mine, reference, eager, bounds)
    if not comparison.accepted:
        tensors = {
            name: Computed(given, right, axes)
            for name, given, right, axes in zip(names, mine, reference, (ROWS, KEYS, KEYS), strict=True)
        }
        what = f"these are not the gradients of attention ({x.described}, dq {mine.dq.shape})"
        raise AssertionError(f"{what}\n{explain(comparison.broken, tensors)}")
