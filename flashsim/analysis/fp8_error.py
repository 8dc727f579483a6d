"""Errors of fp16 and fp8 attention on inputs with outliers: section 4.3 and table 3 of the FlashAttention-3 paper.

Q, K and V have entries N(0, 1) + N(0, 100) * Bernoulli(0.001), 100 being a variance (arXiv 2407.08608, section 4.3).
The error of a variant is the RMSE of its O, rounded to fp16, against float64 attention of the tensors as they were
drawn: what an fp16 tensor loses on rounding its inputs counts, too. The mask is full, since the paper names none.

| variant | what it computes |
|---|---|
| `fp16-standard` | unfused; K / sqrt(D), S, and P divided by its sum, rounded to fp16: see below |
| `fp16-fa3` | fused, P rounded to fp16 before it is divided by its sum |
| `fp8-per-tensor` | fused; Q, K, V and P in e4m3; Q, K and V have one scale each for all heads |
| `fp8-fa3` | a scale for each tile of Q, K, V, and Q and K multiplied by a Hadamard matrix with random signs |
| `fp8-fa3-no-block-quantization` | `fp8-fa3` with the scales of `fp8-per-tensor` |
| `fp8-fa3-no-incoherent-processing` | `fp8-fa3` without the Hadamard matrix |

The standard is the one that FlashAttention-3's own tests hold errors against (`attention_ref` in `hopper/test_util.py`
with `upcast=False, reorder_ops=True`); `torch.baddbmm`, which scales S before rounding it, loses less.

All accumulate in fp32, which is what the float32 products here do. Products of two fp16 or two e4m3 numbers are exact
in float32; the tensor cores of Hopper add those of e4m3 with fewer bits than that, which is left out here. Only the
truth needs float64.

Errors are taken of some rows of O, drawn without replacement: K and V, and the tiles of Q that give the scales, are
whole. The mean of the squares over the rows drawn has no bias; medians over 20 seeds and 512 rows are within 4 % of
those over all rows. Over all rows, one scale for each tile instead of one for a tensor changes the error of `fp8-fa3`
by less than 2 % in either direction: e4m3 is a floating-point format, and once outliers are spread the scale matters
little. The paper has the same 2 %.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashsim.errors import InputError
from flashsim.io.experiment import ErrorScenario, Experiment, check_experiment
from flashsim.numerics.eager import eager_attention
from flashsim.numerics.fp8 import P_SCALE, Blocks, quantize
from flashsim.numerics.hadamard import hadamard_transform
from flashsim.numerics.layout import Float
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

OUTLIER_PROBABILITY = 0.001
OUTLIER_STD = 10.0
MAX_SCORES = 2**22
"""Scores held at a time: 16 MiB in float32."""

Single = NDArray[np.float32]


class _Fp8(NamedTuple):
    blocks: bool
    incoherent: bool


_FP8 = {
    "fp8-per-tensor": _Fp8(blocks=False, incoherent=False),
    "fp8-fa3": _Fp8(blocks=True, incoherent=True),
    "fp8-fa3-no-block-quantization": _Fp8(blocks=False, incoherent=True),
    "fp8-fa3-no-incoherent-processing": _Fp8(blocks=True, incoherent=False),
}


@dataclass(frozen=True)
class VariantError:
    """RMSE of one variant for each seed, and what was published; `ratio` is the median over that."""

    variant: str
    rmse: tuple[float, ...]
    published: float | None = None
    source: str | None = None

    @property
    def median(self) -> float | None:
        """Over the seeds; None if none was finished."""
        return statistics.median(self.rmse) if self.rmse else None

    @property
    def ratio(self) -> float | None:
        """Median / published value; None without one of them."""
        return None if self.median is None or self.published is None else self.median / self.published

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        spread = {"min": min(self.rmse, default=None), "max": max(self.rmse, default=None)}
        return {**asdict(self), "rmse": list(self.rmse), "median": self.median, **spread, "ratio": self.ratio}


def fp8_errors(**values: Any) -> list[VariantError]:
    """Run the experiment; *values* are keys of `Experiment`, whose defaults give the paper's table.

    Raises InputError with one line for each value that does not fit.
    """
    experiment, problems = check_experiment(values, lambda key: key or "fp8_errors")
    if experiment is None:
        raise InputError(problems)
    return summarize(ErrorScenario("", "", experiment, {}), list(seed_errors(experiment)))


def seed_errors(experiment: Experiment) -> Iterator[dict[str, float]]:
    """For each seed, 0 first, the RMSE of every variant."""
    for seed in range(experiment.seeds):
        yield one_seed(experiment, seed)


def summarize(scenario: ErrorScenario, errors: Sequence[dict[str, float]]) -> list[VariantError]:
    """The variants in the order of the scenario, with the seeds that were finished."""
    summary = []
    for variant in scenario.experiment.variants:
        published = scenario.published.get(variant)
        beside = (published.rmse, published.source) if published else (None, None)
        summary.append(VariantError(variant, tuple(found[variant] for found in errors), *beside))
    return summary


def one_seed(experiment: Experiment, seed: int) -> dict[str, float]:
    """The RMSE of every variant for the tensors of one seed. The signs of the Hadamard matrix follow from it, too."""
    numbers, choices = np.random.default_rng(seed).spawn(2)
    shape = (1, experiment.seqlen, experiment.heads, experiment.head_dim)
    q, k, v = (with_outliers(numbers, shape) for _ in range(3))
    rows = np.sort(choices.choice(experiment.seqlen, min(experiment.rows, experiment.seqlen), replace=False))
    truth = attention_reference(q[:, rows], k, v)[0]
    outputs = _outputs(experiment, seed, q, k, v, rows)
    return {variant: float(np.sqrt(np.mean((o - truth) ** 2))) for variant, o in outputs}


def with_outliers(numbers: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001); the second normal is drawn only where it counts."""
    x = numbers.standard_normal(shape)
    outlier = numbers.random(shape) < OUTLIER_PROBABILITY
    x[outlier] += OUTLIER_STD * numbers.standard_normal(np.count_nonzero(outlier))
    return x


def _outputs(
    experiment: Experiment, seed: int, q: Float, k: Float, v: Float, rows: NDArray[np.int64]
) -> Iterator[tuple[str, Float]]:
    """The variants that were asked for, with their O (1, rows, H, D)."""
    scale = experiment.head_dim**-0.5
    wanted = experiment.variants
    if "fp16-standard" in wanted or "fp16-fa3" in wanted:
        q16, k16, v16 = (round_to(x, "fp16") for x in (q, k, v))
        if "fp16-standard" in wanted:
            yield "fp16-standard", eager_attention(q16[:, rows], round_to(k16 * scale, "fp16"), v16, "fp16", scale=1.0)
        if "fp16-fa3" in wanted:
            unscaled = _unscaled(q16), _unscaled(k16), _unscaled(v16)
            yield "fp16-fa3", fused_attention(*unscaled, rows, "fp16", experiment.BLOCK_N, scale)
    tensors = {"q": q, "k": k, "v": v}
    tiles = {"q": experiment.BLOCK_M, "k": experiment.BLOCK_N, "v": experiment.BLOCK_N}

    @functools.cache
    def codes(name: str, blocks: bool, incoherent: bool) -> Blocks:
        x = hadamard_transform(tensors[name], seed) if incoherent else tensors[name]
        return quantize(x, tiles[name] if blocks else None)

    for variant, (blocks, incoherent) in _FP8.items():
        if variant in wanted:
            quantized = codes("q", blocks, incoherent), codes("k", blocks, incoherent), codes("v", blocks, False)
            yield variant, fused_attention(*quantized, rows, "e4m3", experiment.BLOCK_N, scale)


def _unscaled(x: Float) -> Blocks:
    return Blocks(x, np.ones((1, 1, x.shape[2])), x.shape[1])


def fused_attention(
    q: Blocks,  # (1, Sq, H, D)
    k: Blocks,  # (1, Sk, H, D)
    v: Blocks,  # (1, Sk, H, Dv)
    rows: NDArray[np.int64],  # queries
    dtype: str,
    BLOCK_N: int,
    scale: float,
) -> Float:
    """o (1, len(rows), H, Dv) of these queries, rounded to fp16, as FlashAttention computes it in fp32.

    One step of the softmax is `BLOCK_N` keys; a block of K and V is `BLOCK_N` rows or all of them. P = exp(S - running
    maximum) <= 1 is rounded to `dtype`, fp16 or e4m3, 256 times as large in e4m3; its sum is not rounded.
    """
    p_scale = np.float32(P_SCALE if dtype == "e4m3" else 1)
    firsts = np.arange(0, k.codes.shape[1], BLOCK_N)
    q_scales, k_scales, v_scales = (
        x.scales[0, first // x.block].astype(np.float32) for x, first in ((q, rows), (k, firsts), (v, firsts))
    )
    q_scales *= np.float32(scale)
    step = max(1, MAX_SCORES // k.codes.shape[1])
    o = np.empty((1, len(rows), q.codes.shape[2], v.codes.shape[3]))
    for head in range(o.shape[2]):
        k32, v32 = (x.codes[0, :, head].astype(np.float32) for x in (k, v))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            s = q.codes[0, rows[part], head].astype(np.float32) @ k32.T
            scales = q_scales[part, head, None] * k_scales[:, head]
            total = _softmax(s, scales, v_scales[:, head], dtype, p_scale, BLOCK_N)
            o[0, part, head] = s @ v32 / (total * p_scale)
    return round_to(o, "fp16")


def _softmax(s: Single, scales: Single, v_scales: Single, dtype: str, p_scale: np.float32, BLOCK_N: int) -> Single:
    """Replace s (R, Sk) by p_scale * P, rounded tile by tile, and return the sums (R, 1) of P.

    `scales` (R, tiles) are those of S; P is multiplied by `v_scales` (tiles,) after its rounding. A kernel multiplies
    its O by exp(old maximum - new maximum) in each step. The product of these factors is the same, and one product
    with V takes the place of many small ones.
    """
    tiles = [slice(first, first + BLOCK_N) for first in range(0, s.shape[1], BLOCK_N)]
    m = np.full((len(s), 1), -np.inf, dtype=np.float32)
    total = np.zeros_like(m)
    maxima = []
    for number, tile in enumerate(tiles):
        x = s[:, tile] * scales[:, number, None]
        highest = np.maximum(m, x.max(axis=1, keepdims=True))
        p = np.exp(x - highest)
        total = total * np.exp(m - highest) + p.sum(axis=1, keepdims=True)
        s[:, tile] = round_p(p * p_scale, dtype)
        m = highest
        maxima.append(m)
    for number, tile in enumerate(tiles):
        s[:, tile] *= np.exp(maxima[number] - m) * v_scales[number]
    return total


def round_p(p: Single, dtype: str) -> Single:
    """Float32 in [0, 448] rounded to fp16 or e4m3, as `round_to` does, in an eighth of its time.

    From float32 the conversions of NumPy and ml_dtypes round once.
    """
    narrow: Any = np.float16 if dtype == "fp16" else ml_dtypes.float8_e4m3fn
    return p.astype(narrow).astype(np.float32)
