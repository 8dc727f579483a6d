"""Hypothesis strategy of attention problems: small ones, at the sizes where kernels break."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.problem import MAX_HEAD_DIM, AttentionProblem
from flashsim.testing.masks import KINDS_WITH_NUMBERS, LARGEST, NUMBERS, mask_text

T = TypeVar("T")

HEADS = ((1, 1), (2, 1), (1, 2), (1, 3), (2, 2))
"""(heads_kv, query heads per KV head): MHA, MQA and GQA. Each pair tells head h // group from h % heads_kv or h."""
BATCHES = (1, 1, 1, 2)
HEAD_DIMS = (16, 32, 40, 64, 128)
PRIMES = (2, 3, 5, 7, 13, 31, 61, 67, 97, 127, 131, 193, 239, 257, 383, 509)
EQUAL = (0, 0)
SHAPES = (*[(None, None)] * 13, *[EQUAL] * 2, (1, None), (None, 1), (1, 1), (1, 3), (2, 1), (1, 239), (239, 1))
"""(seqlen_q, seqlen_k) in place of the drawn ones: equal, a single query or key, and such pairs of flash-attn."""
TILES, FEW = (16, 32, 64, 128), 4
"""Tiles of a kernel that does not say which it has, and how many of each: their edges matter most."""


class ProblemOptions(TypedDict, total=False):
    """The arguments of `attention_problems`."""

    tile: tuple[int, int] | None
    max_tiles: tuple[int, int]
    head_dims: Sequence[int]
    masks: Sequence[str]
    dtypes: Sequence[str]
    gqa: bool
    same_head_dim: bool
    same_seqlen: bool
    blind_rows: bool
    max_flops: float
    dropout: Sequence[float]


def attention_problems(
    *,
    tile: tuple[int, int] | None = None,
    max_tiles: tuple[int, int] = (3, 6),
    head_dims: Sequence[int] = HEAD_DIMS,
    masks: Sequence[str] = ("full", "causal"),
    dtypes: Sequence[str] = ("fp16", "bf16"),
    gqa: bool = True,
    same_head_dim: bool = False,
    same_seqlen: bool = False,
    blind_rows: bool = True,
    max_flops: float = 2e7,
    dropout: Sequence[float] = (0.0,),
) -> st.SearchStrategy[AttentionProblem]:
    """Problems of 1 or 2 batches and 1 to 4 query heads; they shrink to one query and one key.

    tile: (BLOCK_M, BLOCK_N) of the kernel. Lengths reach to `max_tiles` of these and one element more: whole tiles,
        one element beside them, primes, anything. None: tiles of 16 to 128, lengths up to 513.
        The two lengths are independent; (1, 1), (1, 3), (2, 1), (1, 239) and (239, 1) come whatever the tile is.
    head_dims: `head_dim` and `head_dim_v` are drawn independently, or with `same_head_dim` once for both.
    masks, dtypes: the first is what a failure shrinks to.
        A kind of mask without its numbers, such as "window", gets numbers that go with the lengths; not "blocks".
    gqa: whether query heads may share KV heads.
    same_seqlen: seqlen_q == seqlen_k only.
    blind_rows: whether causal problems may have seqlen_q > seqlen_k, whose first rows see no key.
    max_flops: no problem has more than this many FLOPs.
    dropout: probabilities with which elements of P are dropped, for kernels with the bits of `numerics.philox.keep`.

    Raises InputError with one line per argument that does not fit.
    """
    _check(tile, max_tiles, head_dims, masks, dtypes, max_flops, dropout)
    blocks = (TILES, TILES) if tile is None else ((tile[0],), (tile[1],))
    most_q, most_k = (FEW, FEW) if tile is None else max_tiles
    return _problems(
        _lengths("seqlen_q", blocks[0], most_q),
        None if same_seqlen else _lengths("seqlen_k", blocks[1], most_k),
        sorted(set(head_dims)),
        list(masks),
        list(dtypes),
        [(heads_kv, group) for heads_kv, group in HEADS if gqa or group == 1],
        same_head_dim,
        blind_rows,
        max_flops,
        list(dropout),
    )


def _choice(name: str, values: Sequence[T]) -> st.SearchStrategy[T]:
    """One of `values`, the first if it may be.

    Hypothesis copies choices between strategies that look alike and would spend five of six examples on that; the name
    makes this one unlike all others.
    """
    return st.sampled_from([(name, value) for value in values]).map(lambda named: named[1])


@st.composite
def _problems(
    draw: st.DrawFn,
    lengths_q: st.SearchStrategy[int],
    lengths_k: st.SearchStrategy[int] | None,
    head_dims: list[int],
    masks: list[str],
    dtypes: list[str],
    heads: list[tuple[int, int]],
    same_head_dim: bool,
    blind_rows: bool,
    max_flops: float,
    dropout: list[float],
) -> AttentionProblem:
    # Every problem takes the same number of choices, whether it uses them or not: Hypothesis shrinks to the fewest
    # choices first, and to the smallest ones only among these.
    mask, dtype = draw(_choice("mask", masks)), draw(_choice("dtype", dtypes))
    seqlen_q = seqlen_k = draw(lengths_q)
    if lengths_k is not None:
        seqlen_k = draw(lengths_k)
        shape = draw(_choice("shape", SHAPES))
        if shape == EQUAL:
            seqlen_q = seqlen_k = min(seqlen_q, seqlen_k)
        seqlen_q, seqlen_k = shape[0] or seqlen_q, shape[1] or seqlen_k
    seqlen_q, seqlen_k = _within(seqlen_q, seqlen_k, int(max_flops / 4 / head_dims[0]))
    if mask == "documents":
        seqlen_q = seqlen_k = min(seqlen_q, seqlen_k)
    if mask == "causal" and not blind_rows:
        seqlen_q, seqlen_k = sorted((seqlen_q, seqlen_k))

    def pick(name: str, options: list[T], most: int) -> T:
        """One of the options; there are `most` where none makes the problem too large."""
        return options[draw(_choice(name, range(most))) % len(options)]

    left = max_flops / 2 / (seqlen_q * seqlen_k)
    smallest = 0 if same_head_dim else head_dims[0]
    head_dim = pick("head_dim", [d for d in head_dims if d + (smallest or d) <= left], len(head_dims))
    head_dim_v = head_dim
    if not same_head_dim:
        head_dim_v = pick("head_dim_v", [d for d in head_dims if head_dim + d <= left], len(head_dims))
    left /= head_dim + head_dim_v
    heads_kv, group = pick("heads", [(n, g) for n, g in heads if n * g <= left], len(heads))
    batch = pick("batch", [n for n in BATCHES if n * heads_kv * group <= left], len(BATCHES))
    if any(kind in KINDS_WITH_NUMBERS for kind in masks):
        numbers = [draw(st.integers(0, LARGEST)) for n in range(NUMBERS)]
        if mask in KINDS_WITH_NUMBERS:
            mask = mask_text(mask, numbers, batch, seqlen_q, seqlen_k)
    dropped = draw(_choice("dropout", dropout)) if len(dropout) > 1 else dropout[0]
    return AttentionProblem(
        batch=batch,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=mask,
        dtype=dtype,
        dropout=dropped,
    )


def _within(seqlen_q: int, seqlen_k: int, most_pairs: int) -> tuple[int, int]:
    """The lengths, made shorter until their product is at most `most_pairs`; equal ones stay equal."""
    if seqlen_q == seqlen_k:
        side = min(seqlen_q, math.isqrt(most_pairs))
        return side, side
    seqlen_q = min(seqlen_q, most_pairs)
    return seqlen_q, min(seqlen_k, most_pairs // seqlen_q)


def _lengths(name: str, blocks: Sequence[int], most: int) -> st.SearchStrategy[int]:
    """1 to `most` tiles and one element: edges of tiles, their neighbors and primes more often than chance has them."""
    longest = max(blocks) * most + 1
    edges = [[block * n + beside for n in range(most + 1) for beside in (-1, 0, 1)] for block in blocks]
    branches = [[n for n in branch if 1 <= n <= longest] for branch in (*edges, PRIMES)]
    return st.one_of([_choice(name, branch) for branch in (range(1, longest + 1), *branches) if branch])


def _check(
    tile: object,
    max_tiles: object,
    head_dims: Sequence[int],
    masks: Sequence[str],
    dtypes: Sequence[str],
    max_flops: float,
    dropout: Sequence[float],
) -> None:
    problems: list[str] = []
    for name, pair in (("tile", (1, 1) if tile is None else tile), ("max_tiles", max_tiles)):
        numbers = pair if isinstance(pair, tuple | list) else ()
        if len(numbers) != 2 or not all(isinstance(n, int) and n >= 1 for n in numbers):
            problems.append(f"{name}: got {pair!r}, must be two whole numbers from 1")
    lists: tuple[tuple[str, str, Any], ...] = (
        ("head_dims", "head_dim", head_dims),
        ("masks", "mask", masks),
        ("dtypes", "dtype", dtypes),
        ("dropout", "dropout", dropout),
    )
    for name, field, values in lists:
        if isinstance(values, str | int | float) or not values:
            problems.append(f"{name}: got {values!r}, must name at least one, in a list or tuple")
            continue
        for value in values:
            if name == "masks" and value in KINDS_WITH_NUMBERS:
                continue
            fields: dict[str, Any] = {"batch": 1, "heads_q": 1, "seqlen_q": 1, "head_dim": 1, field: value}
            if value == "fp8":
                problems.append("dtypes: got 'fp8', its tensors have scales (see flashsim.numerics.fp8)")
            try:
                AttentionProblem(**fields)
            except InputError as error:
                problems.append(f"{name}: {error.problems[0].partition(': ')[2]}")
    if not max_flops >= 4 * MAX_HEAD_DIM:
        problems.append(f"max_flops: got {max_flops!r}, must be at least {4 * MAX_HEAD_DIM}")
    if problems:
        raise InputError(problems)
