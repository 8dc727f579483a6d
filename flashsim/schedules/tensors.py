"""The tensors in HBM that a schedule can name.

A work tile fixes some axes of a tensor: a block of queries or of keys, a head, a split. What it does not fix is an
argument: `tile.K(j)` of a block of queries, `tile.Q(i)` of a block of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from flashsim.problem import DTYPES, AttentionProblem

WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "e4m3": 1}
"""Bytes of an element."""


class Tensor(NamedTuple):
    """Rows and columns of each head."""

    rows: Literal["queries", "keys"]
    columns: Literal["head_dim", "head_dim_v", "one", "keys"]
    dtype: str = "problem"
    """`fp32`, `problem` or, which differs after fp8, `output`."""
    heads: Literal["q", "kv"] = "q"
    splits: bool = False
    """One for each split of the keys."""

    def dtype_of(self, problem: AttentionProblem) -> str:
        """fp32, fp16, bf16 or fp8."""
        return {"problem": problem.dtype, "output": problem.output_dtype}.get(self.dtype, self.dtype)

    def shape(self, problem: AttentionProblem) -> tuple[int, int, int, int]:
        """(batch, rows, heads, columns), of one split."""
        p = problem
        rows = p.seqlen_q if self.rows == "queries" else p.seqlen_k
        columns = {"head_dim": p.head_dim, "head_dim_v": p.head_dim_v, "one": 1, "keys": p.seqlen_k}[self.columns]
        return p.batch, rows, p.heads_q if self.heads == "q" else p.heads_kv, columns

    def size_byte(self, problem: AttentionProblem, splits: int = 1) -> int:
        """In device memory."""
        batch, rows, heads, columns = self.shape(problem)
        return batch * rows * heads * columns * WIDTHS[self.dtype_of(problem)] * (splits if self.splits else 1)


TENSORS: Mapping[str, Tensor] = MappingProxyType(
    {
        "Q": Tensor("queries", "head_dim"),
        "K": Tensor("keys", "head_dim", heads="kv"),
        "V": Tensor("keys", "head_dim_v", heads="kv"),
        "O": Tensor("queries", "head_dim_v", "output"),
        "LSE": Tensor("queries", "one", "fp32"),
        "Q_scale": Tensor("queries", "one", "fp32"),
        "K_scale": Tensor("keys", "one", "fp32", heads="kv"),
        "V_scale": Tensor("keys", "one", "fp32", heads="kv"),
        "dO": Tensor("queries", "head_dim_v", "output"),
        "dQ": Tensor("queries", "head_dim"),
        "dK": Tensor("keys", "head_dim", heads="kv"),
        "dV": Tensor("keys", "head_dim_v", heads="kv"),
    }
)
"""What a call is given and gives back; the scales are what fp8 elements of a row stand for, equal in the rows of a
block. A kernel's own are declared in `Kernel.workspace`."""
INPUTS = frozenset({"Q", "K", "V", "dO"})
"""No kernel writes them."""

assert set(DTYPES) < set(WIDTHS)
