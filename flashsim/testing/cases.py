"""A problem and its tensors as one small value that Hypothesis draws, prints and replays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashsim.errors import InputError, unknown
from flashsim.numerics.layout import Float
from flashsim.numerics.philox import SEED, keep
from flashsim.numerics.rounding import round_to
from flashsim.problem import AttentionProblem
from flashsim.testing.layouts import Layout, with_layout
from flashsim.testing.problems import ProblemOptions, attention_problems
from flashsim.testing.values import KINDS, Tensors, make_inputs

NUMPY_DTYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
DO_STREAM = 1
"""Keeps dO independent of q, k and v, which are made from the seed alone."""
MAX_SEED = 2**16 - 1


@dataclass(frozen=True)
class AttentionCase:
    """Attention to compute: sizes, mask, dtype and dropout of `problem`, tensors that follow from `kind` and `seed`.

    The tensors are made when they are first used, so that drawing and printing a case cost nothing, and its repr makes
    it again. `shared_kv`: K and V of the first batch are those of all. Raises InputError for an unknown kind.
    """

    problem: AttentionProblem
    kind: str = KINDS[0]
    seed: int = 0
    shared_kv: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind: {unknown('kind', self.kind, KINDS)}")

    @cached_property
    def qkv(self) -> Tensors:
        """q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv): read-only float64, exact in the problem's dtype."""
        q, k, v = make_inputs(self.problem, self.kind, self.seed)
        if self.shared_kv:
            k[:], v[:] = k[:1], v[:1]
        for x in (q, k, v):
            x.setflags(write=False)
        return q, k, v

    @property
    def q(self) -> Float:
        return self.qkv[0]

    @property
    def k(self) -> Float:
        return self.qkv[1]

    @property
    def v(self) -> Float:
        return self.qkv[2]

    @cached_property
    def do(self) -> Float:
        """dO (B, Sq, Hq, Dv) for a backward pass: normal, standard deviation 1, read-only float64 as `qkv`."""
        p = self.problem
        generator = np.random.default_rng((self.seed, DO_STREAM))
        do = round_to(generator.standard_normal((p.batch, p.seqlen_q, p.heads_q, p.head_dim_v)), p.dtype)
        do.setflags(write=False)
        return do

    @property
    def mask(self) -> str:
        return self.problem.mask

    @property
    def causal(self) -> bool:
        """Whether the mask is causal, aligned at the bottom right; if not, every query sees every key."""
        return self.problem.mask == "causal"

    @property
    def dropout(self) -> float:
        """The probability with which an element of P is dropped."""
        return self.problem.dropout

    @property
    def dropout_seed(self) -> int:
        """What `numerics.philox.keep` takes: another one for each `seed`, below 2**63, as signed arguments hold."""
        return (SEED + self.seed) % 2**63

    def keep(self) -> NDArray[np.bool_]:
        """(B, Hq, Sq, Sk): the elements of P that are kept, whether the mask allows them or not."""
        p = self.problem
        rows, cols, heads = np.arange(p.seqlen_q), np.arange(p.seqlen_k), np.ndindex(p.batch, p.heads_q)
        kept = [keep(rows, cols, b, h, p.dropout, self.dropout_seed) for b, h in heads]
        return np.reshape(kept, (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k))

    @property
    def dtype(self) -> str:
        """fp16 or bf16."""
        return self.problem.dtype

    def numpy(self, layout: Layout | None = None) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Copies of q, k, v in the problem's dtype, `float16` or ml_dtypes' `bfloat16`, which jax takes as well.

        With a layout: views with its strides; a broadcast one is used for k and v only.
        """
        q, k, v = (_laid_out(_numpy(x, self.dtype), layout, part) for part, x in enumerate(self.qkv))
        return q, k, v

    def numpy_do(self, layout: Layout | None = None) -> NDArray[Any]:
        """A copy of dO, as `numpy` has those of q, k and v."""
        do: NDArray[Any] = _laid_out(_numpy(self.do, self.dtype), layout, 0)
        return do

    def torch(self, device: Any = "cpu", layout: Layout | None = None) -> tuple[Any, Any, Any]:
        """q, k, v as torch tensors on `device`, else as `numpy`. Raises InputError where torch was not imported."""
        q, k, v = (_laid_out(_torch(x, self.dtype, device), layout, part) for part, x in enumerate(self.qkv))
        return q, k, v

    def torch_do(self, device: Any = "cpu", layout: Layout | None = None) -> Any:
        """dO, as `torch` has q, k and v."""
        return _laid_out(_torch(self.do, self.dtype, device), layout, 0)


def _numpy(x: Float, dtype: str) -> NDArray[Any]:
    return x.astype(NUMPY_DTYPES[dtype])


def _torch(x: Float, dtype: str, device: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is None:
        raise InputError("torch: must be imported before a case is asked for its tensors")
    return torch.from_numpy(x.astype(np.float32)).to(device=device, dtype=getattr(torch, TORCH_DTYPES[dtype]))


def _laid_out(x: Any, layout: Layout | None, part: int) -> Any:
    if layout is None:
        return x
    if part == 0:
        layout = replace(layout, broadcast=False)
    return with_layout(x, layout, part)


def attention_inputs(
    problem: AttentionProblem, *, kinds: Sequence[str] = KINDS, shared_kv: bool = False
) -> st.SearchStrategy[AttentionCase]:
    """Cases of one problem, with values of the given kinds; they shrink to the first kind and seed 0.

    `shared_kv`: K and V are the same in all batches. Raises InputError for kinds that do not exist.
    """
    return _cases(st.just(problem), kinds, shared_kv)


def attention_cases(
    *, kinds: Sequence[str] = KINDS, shared_kv: bool = False, **options: Unpack[ProblemOptions]
) -> st.SearchStrategy[AttentionCase]:
    """Cases of the problems that `attention_problems(**options)` draws, with values of the given kinds.

    `shared_kv`: K and V are the same in all batches. Raises InputError as `attention_problems` does, and for kinds
    that do not exist.
    """
    return _cases(attention_problems(**options), kinds, shared_kv)


def _cases(
    problems: st.SearchStrategy[AttentionProblem], kinds: Sequence[str], shared_kv: bool
) -> st.SearchStrategy[AttentionCase]:
    if isinstance(kinds, str) or not kinds:
        raise InputError(f"kinds: got {kinds!r}, must name at least one, in a list or tuple")
    wrong = [f"kinds: {unknown('kind', kind, KINDS)}" for kind in kinds if kind not in KINDS]
    if wrong:
        raise InputError(wrong)
    seeds = st.integers(0, MAX_SEED)
    return st.builds(AttentionCase, problems, st.sampled_from(list(kinds)), seeds, st.just(shared_kv))
