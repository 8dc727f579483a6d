"""Dropout in the rule: tile loops with Philox bits are accepted, forward and backward, and rejected with one bug.

`forward` and `backward` are FlashAttention-2's algorithms with dropout, over KV tiles. The factor 1 / (1 - p) is
applied to P before it is rounded, or at the end, as flash-attn does (csrc/flash_attn/src, rp_dropout).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from twin_cases import VALUES, shaped

from flashsim.numerics.bounds import Bounds, rounding_bounds
from flashsim.numerics.compare import Comparison, compare_gradients, forward_clauses
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.error_terms import DROPOUT, FP32_UNIT
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.philox import keep
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]
Tile = NDArray[np.float32]
f32 = np.float32


OFF = 1000
"""fp32 units by which a factor is wrong, in one test."""


class Case(NamedTuple):
    dtype: str = "fp16"
    mask: str = "causal"
    values: str = "normal"
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    seqlens: tuple[int, int] = (40, 50)
    head_dims: tuple[int, int] = (16, 24)
    BLOCK_N: int = 14
    dropout: float = 0.3
    late: bool = False
    """Whether 1 / (1 - p) is applied at the end."""
    seed: int = 0

    def tensors(self) -> list[Array]:
        (heads, heads_kv), (seqlen_q, seqlen_k), (head_dim, head_dim_v) = self.heads, self.seqlens, self.head_dims
        rng = np.random.default_rng(self.seed)
        shapes = [(seqlen_q, heads, head_dim), (seqlen_k, heads_kv, head_dim), (seqlen_k, heads_kv, head_dim_v)]
        q, k, v = (rng.standard_normal((self.batch, *shape)) for shape in shapes)
        do = rng.standard_normal((self.batch, seqlen_q, heads, head_dim_v))
        return [round_to(x, self.dtype) for x in (*shaped(self.values, q, k, v, head_dim**-0.5, rng), do)]

    def visible(self, keys: NDArray[np.intp]) -> NDArray[np.bool_]:
        seqlen_q, seqlen_k = self.seqlens
        seen = keys <= np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        return seen if self.mask == "causal" else np.ones_like(seen)

    def bits(self, keys: NDArray[np.intp], b: int, h: int, bug: str) -> Tile:
        """(rows, keys): 1 where kept."""
        rows, p, seed = np.arange(self.seqlens[0]), self.dropout, self.seed
        match bug:
            case "bits of one head":
                h = 0
            case "bits of the KV head":
                h = h // (self.heads[0] // self.heads[1])
            case "bits of one batch entry":
                b = 0
            case "bits of the tile's columns":
                keys = keys - keys[0]
            case "bits of the tile's rows":
                rows = rows % 16
            case "batch and head exchanged":
                b, h = h, b
            case "words in reverse":
                keys = keys ^ 3
            case "rows and columns exchanged":
                return keep(keys, rows, b, h, p, seed).T.astype(f32)
            case "bits of another seed":
                seed += 1
            case "keep and drop swapped":
                return 1 - keep(rows, keys, b, h, p, seed).astype(f32)
        return keep(rows, keys, b, h, p, seed).astype(f32)


def rounded(x: Tile, dtype: str) -> Tile:
    return round_to(x, dtype).astype(f32)


def factors(case: Case, bug: str) -> tuple[np.float32, np.float32]:
    """By what P is multiplied before it is rounded, and by what the result is, of 1 / (1 - p)."""
    factor = f32(1) / (f32(1) - f32(case.dropout))
    if bug in ("factor high", "factor low"):
        factor *= f32(1 + (OFF if bug == "factor high" else -OFF) * FP32_UNIT)
    if bug == "not rescaled":
        return f32(1), f32(1)
    if bug == "rescaled twice":
        return factor, factor
    if bug == "rescaled by 1 - p":
        return f32(1) - f32(case.dropout), f32(1)
    return (f32(1), factor) if case.late else (factor, f32(1))


def forward(case: Case, tensors: list[Array], bug: str = "") -> tuple[Array, Array]:
    q, k, v = (x.astype(f32) for x in tensors[:3])
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, heads_kv, head_dim_v) = q.shape, v.shape
    o, lse = np.zeros((batch, seqlen_q, heads, head_dim_v)), np.zeros((batch, heads, seqlen_q))
    early, late = factors(case, bug)
    for b, h in np.ndindex(batch, heads):
        kv = h // (heads // heads_kv)
        m, total, acc = np.full((seqlen_q, 1), -np.inf, f32), f32(0), np.zeros((seqlen_q, head_dim_v), f32)
        for start in range(0, seqlen_k, case.BLOCK_N):
            keys = np.arange(start, min(start + case.BLOCK_N, seqlen_k))
            s = np.where(case.visible(keys), q[b, :, h] @ k[b, keys, kv].T * f32(head_dim**-0.5), f32(-np.inf))
            m_new = np.maximum(m, s.max(axis=1, keepdims=True))
            safe = np.where(m_new == -np.inf, f32(0), m_new)
            p, alpha = np.exp(s - safe), np.exp(m - safe)
            bits = case.bits(keys, b, h, bug)
            if bug == "dropped before the sum":
                p = p * bits
            total = total * alpha + p.sum(axis=1, keepdims=True)
            acc = acc * alpha + rounded(p * bits * early, case.dtype) @ v[b, keys, kv]
            m = m_new
        seen = total > 0
        total = np.where(seen, total, f32(1))
        o[b, :, h] = round_to(np.where(seen, acc / total * late, 0), case.dtype)
        lse[b, h] = np.where(seen, m + np.log(total), -np.inf)[:, 0]
    return o, lse


def backward(case: Case, tensors: list[Array], bug: str = "") -> Gradients:
    """From O and LSE of a correct forward pass. Late: dS is 1 - p times what it is, and dQ and dK are divided later."""
    before = "factor low" if bug == "factor high" else ""
    saved_o, saved_lse = (x.astype(f32) for x in forward(case, tensors, before))
    q, k, v, do = (x.astype(f32) for x in tensors)
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, heads_kv, head_dim_v) = q.shape, v.shape
    scale, whole = f32(head_dim**-0.5), f32(1) - f32(case.dropout)
    dq = np.zeros((batch, seqlen_q, heads, head_dim), f32)
    dk, dv = (np.zeros((batch, seqlen_k, heads_kv, width), f32) for width in (head_dim, head_dim_v))
    early, late = factors(case, bug)
    for b, h in np.ndindex(batch, heads):
        kv, log_sum = h // (heads // heads_kv), saved_lse[b, h][:, None]
        log_sum = np.where(log_sum == -np.inf, f32(np.inf), log_sum)
        d = np.sum(do[b, :, h] * saved_o[b, :, h], axis=1, keepdims=True)
        if case.late and bug != "D not rescaled":
            d = d * whole
        if bug == "D of O without dropout":
            d = np.sum(do[b, :, h] * attention_reference(*tensors[:3], case.mask)[0][b, :, h], axis=1, keepdims=True)
            d = (d * (whole if case.late else 1)).astype(f32)
        for start in range(0, seqlen_k, case.BLOCK_N):
            keys = np.arange(start, min(start + case.BLOCK_N, seqlen_k))
            s = np.where(case.visible(keys), q[b, :, h] @ k[b, keys, kv].T * scale, f32(-np.inf))
            p, bits = np.exp(s - log_sum), case.bits(keys, b, h, bug)
            ones = np.ones_like(bits)
            dv_bits = ones if bug == "dV not masked" else bits
            dp = do[b, :, h] @ v[b, keys, kv].T * (ones if bug == "dP not masked" else bits)
            dp = dp * (f32(1) if bug == "dP not rescaled" else early)
            ds = p * (bits if bug == "dS masked" else ones) * (dp - d)
            ds = rounded(ds, case.dtype)
            dv[b, keys, kv] += rounded(p * dv_bits * early, case.dtype).T @ do[b, :, h]
            dk[b, keys, kv] += ds.T @ q[b, :, h]
            dq[b, :, h] += ds @ k[b, keys, kv]
    return Gradients(*(round_to(x, case.dtype) for x in (dq * scale * late, dk * scale * late, dv * late)))


class Judge:
    """What results of a case are held against."""

    def __init__(self, case: Case) -> None:
        self.case, self.tensors = case, case.tensors()
        self.drop: Any = {"dropout": case.dropout, "dropout_seed": case.seed}

    def forward(self, bug: str = "") -> tuple[Comparison, bool]:
        """The rule's verdict, and whether O and LSE stay within the bounds alone."""
        case, (*qkv, _) = self.case, self.tensors
        o, lse = forward(case, self.tensors, bug)
        exact, exact_lse = attention_reference(*qkv, case.mask, **self.drop)
        eager = eager_attention(*qkv, case.dtype, case.mask, **self.drop)
        bounds = rounding_bounds(*qkv, case.dtype, case.mask, BLOCK_N=case.BLOCK_N, **self.drop)
        within = self.within(o, exact, bounds.o, bounds.o_mean) and within_lse(lse, exact_lse, bounds)
        within = within and bool(np.mean((o - exact) ** 2) <= bounds.o_rms**2)
        return Comparison(forward_clauses(o, lse, exact, exact_lse, eager, bounds)), within

    def backward(self, bug: str = "") -> tuple[Comparison, bool]:
        case = self.case
        given_ = backward(case, self.tensors, bug)
        exact = attention_gradients_reference(*self.tensors, case.mask, **self.drop)
        eager = eager_gradients(*self.tensors, case.dtype, case.mask, **self.drop)
        bounds = gradient_bounds(*self.tensors, case.dtype, case.mask, BLOCK_N=case.BLOCK_N, **self.drop)
        within = all(self.within(*it) for it in zip(given_, exact, *bounds, strict=True))
        return compare_gradients(given_, exact, eager, bounds), within

    @staticmethod
    def within(x: Array, exact: Array, largest: Array, mean: float) -> bool:
        error = np.abs(x - exact)
        return bool((error <= largest).all() and np.mean(error) <= mean)


def within_lse(lse: Array, exact: Array, bounds: Bounds) -> bool:
    seen = exact > -np.inf
    return bool((np.abs(lse - exact)[seen] <= (bounds.lse + FP32_UNIT * np.abs(exact))[seen]).all())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_kv, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    lengths = st.one_of(st.sampled_from([1, 2, 5, 16, 17, 33]), st.integers(1, 70))
    return Case(
        dtype=draw(st.sampled_from(["fp16", "bf16", "fp32"])),
        mask=draw(st.sampled_from(["full", "causal"])),
        values=draw(st.sampled_from(VALUES)),
        batch=draw(st.sampled_from([1, 2])),
        heads=(heads_kv * group, heads_kv),
        seqlens=(draw(lengths), draw(lengths)),
        head_dims=(draw(st.sampled_from([1, 16, 40])), draw(st.sampled_from([1, 24]))),
        BLOCK_N=draw(st.sampled_from([8, 14, 16, 32])),
        dropout=draw(st.sampled_from([0.1, 0.17, 0.5, 0.9, 0.999, 2.0**-30])),
        late=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(cases())
@example(
    # Two of 180 rows have nearly all the error.
    Case("fp16", "full", "decreasing", 1, (3, 1), (60, 60), (16, 1), 8, dropout=0.999, late=True)
)
def test_correct_kernels_are_never_rejected(case: Case) -> None:
    with np.errstate(invalid="ignore"):
        judge = Judge(case)
        for result, within in (judge.forward(), judge.backward()):
            assert result.broken == ()
            assert within


BITS = (
    "bits of one head", "bits of the KV head", "bits of one batch entry", "bits of the tile's columns",
    "bits of the tile's rows", "batch and head exchanged", "words in reverse", "rows and columns exchanged",
    "bits of another seed", "keep and drop swapped",
)  # fmt: skip
SCALES = ("not rescaled", "rescaled twice", "rescaled by 1 - p")
FORWARD = (*BITS, *SCALES, "dropped before the sum")
BACKWARD = (
    *BITS, *SCALES, "dP not masked", "dP not rescaled", "dV not masked", "dS masked", "D of O without dropout",
    "D not rescaled",
)  # fmt: skip
WHERE = {"dP not rescaled": False, "D not rescaled": True}
"""Whether 1 / (1 - p) comes late in kernels that can have these bugs."""
SPOILED = {
    "dP not masked": {"dq", "dk"}, "dP not rescaled": {"dq", "dk"}, "dS masked": {"dq", "dk"},
    "D of O without dropout": {"dq", "dk"}, "D not rescaled": {"dq", "dk"}, "dV not masked": {"dv"},
}  # fmt: skip
"""The gradients that a bug reaches; the others all do."""
DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])


def rejecting(result: Comparison) -> set[str]:
    return {clause.what.partition(":")[0] for clause in result.broken}


@DTYPES
@pytest.mark.parametrize("bug", FORWARD)
def test_a_bug_in_the_forward_pass_is_rejected(bug: str, dtype: str) -> None:
    for dropout, late in ((0.1, False), (0.3, True), (0.5, False)):
        case = Case(dtype, dropout=dropout, late=late)
        assert Judge(case).forward()[0].accepted
        assert "O" in rejecting(Judge(case).forward(bug)[0])


@DTYPES
@pytest.mark.parametrize("bug", BACKWARD)
def test_a_bug_in_the_backward_pass_is_rejected(bug: str, dtype: str) -> None:
    """Its forward pass is right: the bits of the backward pass alone are others."""
    for dropout, late in ((0.1, False), (0.3, True), (0.5, False)):
        case = Case(dtype, dropout=dropout, late=WHERE.get(bug, late))
        assert Judge(case).backward()[0].accepted
        found = rejecting(Judge(case).backward(bug)[0])
        assert found
        assert found == SPOILED.get(bug, found)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dropout", [0.3, 0.9])
@pytest.mark.parametrize("seqlen_k", [50, 1])
def test_errors_of_the_factor_are_counted(
    dropout: float, late: bool, seqlen_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32: a factor that is wrong by so many units is outside of the bounds, and inside if these count so many.

    In the forward pass before a backward pass it is wrong in the other direction. With one key dS is 0, and what is
    left of it is all error.
    """
    judge = Judge(Case("fp32", "full", seqlens=(40, seqlen_k), dropout=dropout, late=late))
    for part in (judge.forward, judge.backward):
        assert part()[1]
        assert not part("factor high")[1]
    monkeypatch.setattr("flashsim.numerics.error_terms.DROPOUT", OFF + DROPOUT)
    assert judge.forward("factor high")[1]
    assert judge.backward("factor high")[1]


def test_the_lse_tells_what_was_summed() -> None:
    """The sum over kept keys alone, which a rule for O could take for another scaling."""
    assert rejecting(Judge(Case()).forward("dropped before the sum")[0]) == {"O", "LSE"}
    assert rejecting(Judge(Case()).forward("not rescaled")[0]) == {"O"}
