"""Small attention problems for twins: a list that is always tried, and a Hypothesis strategy for more of them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import twin
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.numerics.bounds import rounding_bounds
from flashsim.numerics.compare import Comparison, compare_fp8, compare_gradients, forward_clauses
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.error_terms import FP32_UNIT
from flashsim.numerics.fp8 import Blocks, emulated_attention, fp8_bounds, quantize
from flashsim.numerics.gradient_bounds import gradient_bounds
from flashsim.numerics.gradients import Gradients, attention_gradients_reference, eager_gradients
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

Array = NDArray[np.float64]

PARTS = ("forward", "backward", "fp8")
DTYPES = ("fp16", "bf16", "fp32")
"""In fp32, all that is left are the roundings which the derivations count in fp32 units."""
VALUES = (
    "normal", "x3", "overflow", "outliers", "constant", "ones", "increasing", "decreasing", "negative", "tiny",
    "integers", "equal keys", "tail", "underflow", "loud rows", "positive", "drift",
)  # fmt: skip


class Case(NamedTuple):
    """A problem, its values, and how the twin cuts it into tiles. `part` is forward, backward or fp8 (forward)."""

    part: str = "forward"
    dtype: str = "fp16"
    mask: str = "full"
    values: str = "normal"
    batch: int = 1
    heads: tuple[int, int] = (1, 1)
    seqlens: tuple[int, int] = (40, 40)
    head_dims: tuple[int, int] = (16, 16)
    blocks: tuple[int, int] = (16, 16)
    last_first: bool = False
    scale: float | None = None
    seed: int = 0

    def tensors(self) -> tuple[Array, Array, Array, Array]:
        """q, k, v and dO, rounded to the dtype; fp8 rounds them later, with scales."""
        (heads_q, heads_kv), (seqlen_q, seqlen_k), (head_dim, head_dim_v) = self.heads, self.seqlens, self.head_dims
        rng = np.random.default_rng(self.seed)
        q, k, v, do = (
            rng.standard_normal((self.batch, *shape))
            for shape in (
                (seqlen_q, heads_q, head_dim),
                (seqlen_k, heads_kv, head_dim),
                (seqlen_k, heads_kv, head_dim_v),
                (seqlen_q, heads_q, head_dim_v),
            )
        )
        scale = head_dim**-0.5 if self.scale is None else self.scale
        q, k, v = shaped(self.values, q, k, v, scale, rng)
        if self.values == "drift":
            do = 1 + 0.1 * do
        q, k, v, do = (round_to(x, self.dtype) for x in (q, k, v, do))
        return q, k, v, do


def shaped(values: str, q: Array, k: Array, v: Array, scale: float, rng: np.random.Generator) -> tuple[Array, ...]:
    """Normal numbers made into `values`."""
    toward = np.ones(q.shape[-1]) / (q.shape[-1] * scale)  # a query of ones has score x with x times this key
    along = np.linspace(0, 1, k.shape[1])[:, None, None]
    match values:
        case "x3":
            return 3 * q, 3 * k, 3 * v
        case "overflow":
            return 5 * q, 3 * k, 3 * v
        case "outliers":
            return tuple(x + 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 0.02) for x in (q, k, v))
        case "constant":
            return tuple(np.full_like(x, rng.standard_normal()) for x in (q, k, v))
        case "ones":
            return np.ones_like(q), np.ones_like(k), v
        case "increasing":
            return 1 + 0.05 * q, (120 * along * toward) * (1 + 0.05 * k), v
        case "decreasing":
            return 1 + 0.05 * q, (120 * (0.5 - along) * toward) * (1 + 0.05 * k), v
        case "negative":
            return 1 + 0.05 * q, -110 * toward * (1 + 0.02 * k), v
        case "tiny":
            return 0.02 * q, 0.02 * k, 1e-3 * v
        case "integers":
            return tuple(np.rint(np.clip(x, -2, 2)) for x in (q, k, v))
        case "equal keys":
            return q, np.broadcast_to(k[:, :1], k.shape), v
        case "tail":  # one key has nearly all the weight and no value; the others share what is left
            first = np.arange(k.shape[1])[:, None, None] == 0
            return np.ones_like(q), np.where(first, 8 * toward, 0.2 * toward * k), np.where(first, 0, v)
        case "underflow":  # the same, with weights down to what the dtype has no number for
            above, size = 6 + 14 * rng.random(), 10.0 ** rng.integers(-6, 4)
            first = np.arange(k.shape[1])[:, None, None] == 0
            return np.ones_like(q), np.where(first, above * toward, 0.2 * toward * k), np.where(first, 0, size * v)
        case "loud rows":
            return q * np.where(np.arange(q.shape[1]) % 5 == 2, 30, 0.3)[:, None, None], k, v
        case "positive":
            return q, k, 0.5 + np.abs(v)
        case "drift":  # in O, dQ and dK, sums of many terms that are much alike
            side = np.where(along < 0.5, -0.2, 0.2)
            return 1 + 0.05 * q, side * toward * (1 + 0.05 * k), (1 + along) * (1 + 0.1 * v)
    return q, k, v


Outputs = tuple[Array, ...]
"""o and lse, or dq, dk and dv."""


class Prepared:
    """A case with everything that its results are held against."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype, mask, scale, BLOCK_N = case.dtype, case.mask, case.scale, case.blocks[1]
        *tensors, do = case.tensors()
        self.codes: tuple[Blocks, ...] = ()
        if case.part == "fp8":
            blocks = (case.blocks[0], BLOCK_N, BLOCK_N)
            self.codes = tuple(quantize(x, block) for x, block in zip(tensors, blocks, strict=True))
            tensors = [quantized.values for quantized in self.codes]
        self.tensors: tuple[Array, ...] = tuple(tensors)
        o, lse = attention_reference(*tensors, mask, scale)
        if case.part == "backward":
            saved = twin.forward(*tensors, dtype, mask, scale, *case.blocks)
            self.tensors = (*tensors, *saved, do)
            self.reference: Outputs = attention_gradients_reference(*tensors, do, mask, scale)
            self.eager: Outputs = eager_gradients(*tensors, do, dtype, mask, scale)
            self.gradient_bounds = gradient_bounds(*tensors, do, dtype, mask, scale, BLOCK_N=BLOCK_N)
        elif case.part == "fp8":
            self.reference, self.eager = (o, lse), (emulated_attention(*tensors, dtype, mask, scale),)
            self.bounds = fp8_bounds(*tensors, dtype, mask, scale, BLOCK_N=BLOCK_N)
        else:
            self.reference, self.eager = (o, lse), (eager_attention(*tensors, dtype, mask, scale),)
            self.bounds = rounding_bounds(*tensors, dtype, mask, scale, BLOCK_N=BLOCK_N)

    def run(self, module: ModuleType) -> Outputs:
        """What the twin of this module makes of the case."""
        case = self.case
        arguments = (case.dtype, case.mask, case.scale)
        if case.part == "backward":
            return module.backward(*self.tensors, *arguments, *case.blocks)
        if case.part == "fp8":
            return module.forward_fp8(*self.codes, *arguments, case.last_first)
        return module.forward(*self.tensors, *arguments, *case.blocks, case.last_first)

    def judge(self, outputs: Outputs) -> Comparison:
        """What the acceptance rule says."""
        if self.case.part == "backward":
            given, reference, eager = (Gradients(*x) for x in (outputs, self.reference, self.eager))
            return compare_gradients(given, reference, eager, self.gradient_bounds)
        arguments = (*outputs, *self.reference, self.eager[0], self.bounds)
        return compare_fp8(*arguments) if self.case.part == "fp8" else Comparison(forward_clauses(*arguments))

    def stays_within_bounds(self, outputs: Outputs) -> bool:
        """What the derivations claim, without help from eager: for each element, the mean, the root mean square."""
        if self.case.part == "backward":
            claims = list(zip(outputs, self.reference, *self.gradient_bounds, strict=True))
        else:
            (o, lse), (o_ref, lse_ref), bounds = outputs, self.reference, self.bounds
            claims = [(o, o_ref, bounds.o, bounds.o_mean)]
            seen = lse_ref > -np.inf
            # The bound is of the computation; storing the result rounds once more.
            lse_bound = (bounds.lse + FP32_UNIT * np.abs(np.where(seen, lse_ref, 0)))[seen]
            if (np.abs(lse[seen] - lse_ref[seen]) > lse_bound).any() or np.mean((o - o_ref) ** 2) > bounds.o_rms**2:
                return False
        errors = [(np.abs(given - exact), largest, mean) for given, exact, largest, mean in claims]
        return all((error <= largest).all() and np.mean(error) <= mean for error, largest, mean in errors)


def _listed() -> tuple[Case, ...]:
    """Every kind of values; lengths of 1, 2, 5 and 17; tails; GQA; Sq != Sk both ways; rows that see no key."""
    shapes = [
        {},
        {"mask": "causal", "batch": 2, "heads": (4, 2), "seqlens": (40, 57)},
        {"mask": "causal", "heads": (2, 1), "seqlens": (33, 20), "head_dims": (8, 24), "last_first": True},
        {"batch": 2, "heads": (3, 3), "seqlens": (21, 83), "head_dims": (32, 16), "blocks": (16, 32)},
        {"mask": "causal", "heads": (4, 2), "seqlens": (50, 50), "blocks": (32, 16), "scale": 0.5},
        {"mask": "causal", "heads": (6, 2), "seqlens": (17, 70), "blocks": (8, 8), "last_first": True},
    ]
    found = []
    for n, values in enumerate(VALUES):
        for part, dtype in (("forward", "fp16"), ("forward", "bf16"), ("backward", "fp16"), ("backward", "bf16")):
            for shape in (shapes[n % 6], shapes[(n + 1 + 3 * (dtype == "bf16")) % 6]):
                found.append(Case(part, dtype, values=values, seed=n, **shape))
        found.append(Case("fp8", "bf16", values=values, seed=n, **shapes[n % 6]))
        found.append(Case("fp8", "fp16", values=values, seed=n, **shapes[(n + 1) % 6]))
    # Hundreds of tiles: what is accumulated in low precision drifts away.
    found += [Case("forward", dtype, values="drift", seqlens=(8, 1024), blocks=(8, 2)) for dtype in ("fp16", "bf16")]
    found.append(Case("backward", "bf16", values="drift", seqlens=(8, 1024), blocks=(8, 2)))
    found.append(Case("backward", "bf16", values="drift", seqlens=(1024, 8), blocks=(2, 8)))
    found += [Case("fp8", dtype, values="positive", seqlens=(32, 128)) for dtype in ("fp16", "bf16")]
    # Weights from normal numbers of the dtype down to 0.
    for part in PARTS:
        found += [Case(part, "fp16", values="underflow", seqlens=(4, 30), seed=100 + n) for n in range(6)]
    for part in PARTS:
        for n, length in enumerate((1, 2, 5, 17)):
            lengths = {"seqlens": (length, length), "values": ("overflow", "normal")[n % 2], "seed": n}
            found.append(Case(part, "fp16", "causal", heads=(2, 1), **lengths))
        found.append(Case(part, "bf16", seqlens=(64, 64), batch=2, heads=(2, 2), head_dims=(64, 64)))
    return tuple(found)


LISTED = _listed()


@st.composite
def cases(draw: st.DrawFn, parts: tuple[str, ...] = PARTS) -> Case:
    """Any small problem; a seed stands for the numbers, so that a draw is cheap."""
    heads_kv, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (1, 4)]))
    lengths = st.one_of(st.sampled_from([1, 2, 5, 16, 17, 32, 33, 64]), st.integers(1, 70))
    head_dims = st.sampled_from([1, 8, 16, 32, 40, 64])
    blocks = st.sampled_from([1, 8, 16, 24, 32, 64])
    head_dim, seqlen_q, seqlen_k = draw(head_dims), draw(lengths), draw(lengths)
    BLOCK_M, BLOCK_N = draw(blocks), draw(blocks)
    # At most some 40 tiles, or the twin would take longer than everything else.
    BLOCK_M, BLOCK_N = max(BLOCK_M, seqlen_q // 6), max(BLOCK_N, seqlen_k // 6)
    return Case(
        part=draw(st.sampled_from(parts)),
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from(["full", "causal"])),
        values=draw(st.sampled_from(VALUES)),
        batch=draw(st.sampled_from([1, 1, 2])),
        heads=(heads_kv * group, heads_kv),
        seqlens=(seqlen_q, seqlen_k),
        head_dims=(head_dim, draw(st.sampled_from([head_dim, head_dim, 1, 24]))),
        blocks=(BLOCK_M, BLOCK_N),
        last_first=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.1, 0.7])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
