"""Packing of the query heads that share a KV head into the rows of one tile: flash-attn's `pack_gqa`.

As there (`hopper/pack_gqa.h`), heads vary faster than queries: row r of packed head kv is query r // group of head
kv * group + r % group. A packed problem does the same work on the same bytes; only the tiles of queries are others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from flashsim.errors import InputError
from flashsim.problem import AttentionProblem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T", bound="np.generic")


def packed(problem: AttentionProblem) -> AttentionProblem:
    """The same attention with `heads_per_kv` rows for each query and one query head for each KV head.

    The problem itself if heads share no KV head. A list of blocks is read from its file again.
    Raises InputError if there are more than 2**31 - 1 rows.
    """
    group = problem.heads_per_kv
    if group == 1:
        return problem
    return replace(
        problem,
        heads_q=problem.heads_kv,
        seqlen_q=problem.seqlen_q * group,
        mask=f"packed:{group}:{problem.mask}",
    )


def pack(tensor: NDArray[T], group: int) -> NDArray[T]:
    """(B, S * group, Hq / group, ...) from Q, O or a gradient (B, S, Hq, D), or from (B, S, Hq).

    An LSE (B, Hq, S) needs its last two axes swapped. A view if it can be one, as it can for one KV head, else a copy.
    Raises InputError, one line for each argument that does not fit.
    """
    _check(tensor, group, axis=2)
    batch, seqlen, heads, *rest = tensor.shape
    split = tensor.reshape(batch, seqlen, heads // group, group, *rest)
    return split.swapaxes(2, 3).reshape(batch, seqlen * group, heads // group, *rest)


def unpack(tensor: NDArray[T], group: int) -> NDArray[T]:
    """The inverse of `pack`: (B, S, H * group, ...) from (B, S * group, H, D) or (B, S * group, H)."""
    _check(tensor, group, axis=1)
    batch, rows, heads, *rest = tensor.shape
    split = tensor.reshape(batch, rows // group, group, heads, *rest)
    return split.swapaxes(2, 3).reshape(batch, rows // group, heads * group, *rest)


def _check(tensor: NDArray[Any], group: int, axis: int) -> None:
    problems = []
    if tensor.ndim not in (3, 4):
        problems.append(
            f"tensor: must have 4 dimensions (batch, seqlen, heads, head_dim), or the first 3 of them, "
            f"got shape {tensor.shape}"
        )
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        problems.append(f"group: got {group!r}, must be a whole number from 1")
    elif not problems and tensor.shape[axis] % group:
        what = ("batch", "seqlen", "heads")[axis]
        problems.append(f"tensor: {what} {tensor.shape[axis]} is not a multiple of group = {group}")
    if problems:
        raise InputError(problems)
