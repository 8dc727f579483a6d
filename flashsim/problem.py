"""The attention problem: sizes, FLOP and byte counts, and which KV tiles a Q tile visits.

Tensors are (batch, seqlen, heads, head_dim). Nothing here depends on a GPU or a schedule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flashsim.errors import InputError, unknown
from flashsim.masks import KVWalk, Mask, parse_mask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = {"fp16": 2, "bf16": 2, "fp8": 1}
"""Bytes per element of Q, K and V; fp8 is e4m3."""
OUTPUT_DTYPES = {"fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}
"""What O is written in: 16 bits after fp8, too (flash-attn's interface)."""
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")

MAX_SIZE = 2**31 - 1
"""Largest batch, head count or length: what a kernel's 32-bit index holds."""
MAX_HEAD_DIM = 512
LSE_BYTES = 4
"""LSE is fp32 in every schedule."""


def _shown(given: object) -> str:
    try:
        text = repr(given)
    except ValueError:  # an int of more than 4300 digits has no text
        text = f"a very large {type(given).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _size(name: str, given: object, limit: int, problems: list[str]) -> int:
    """`given` as int; a line in `problems`, and 0, if it is not a whole number from 1 to `limit`."""
    try:
        if isinstance(given, bool):
            raise TypeError
        size = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        size = 0
    if not 1 <= size <= limit:
        problems.append(f"{name}: got {_shown(given)}, must be a whole number from 1 to {limit}")
        return 0
    return size


def _check_name(field: str, given: object, allowed: tuple[str, ...], problems: list[str]) -> None:
    if not isinstance(given, str):
        problems.append(f"{field}: must be text, got {type(given).__name__} (allowed: {', '.join(allowed)})")
    elif given not in allowed:
        problems.append(f"{field}: {unknown(field, given, allowed)}")


@dataclass(frozen=True, init=False)
class AttentionProblem:
    """One attention operation. `heads_kv`, `seqlen_k` and `head_dim_v` default to `heads_q`, `seqlen_q`, `head_dim`.

    Sizes are whole numbers from 1; head dims end at 512, the other sizes at 2**31 - 1; `heads_kv` divides `heads_q`.
    `dtype` is fp16, bf16 or fp8 (forward only), `mask` one of `flashsim.masks.SPELLING`, `direction` fwd, bwd or
    fwd+bwd, `dropout` the probability with which an element of P is dropped, in [0, 1).
    Raises InputError with one line per field that is wrong.
    """

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    mask: str
    direction: str
    dropout: float

    def __init__(
        self,
        *,
        batch: int,
        heads_q: int,
        seqlen_q: int,
        head_dim: int,
        heads_kv: int | None = None,
        seqlen_k: int | None = None,
        head_dim_v: int | None = None,
        dtype: str = "fp16",
        mask: str = "full",
        direction: str = "fwd",
        dropout: float = 0.0,
    ) -> None:
        problems: list[str] = []
        sizes = {
            name: _size(name, given, limit, problems)
            for name, given, limit in (
                ("batch", batch, MAX_SIZE),
                ("heads_q", heads_q, MAX_SIZE),
                ("seqlen_q", seqlen_q, MAX_SIZE),
                ("head_dim", head_dim, MAX_HEAD_DIM),
            )
        }
        for name, given, limit, default in (
            ("heads_kv", heads_kv, MAX_SIZE, "heads_q"),
            ("seqlen_k", seqlen_k, MAX_SIZE, "seqlen_q"),
            ("head_dim_v", head_dim_v, MAX_HEAD_DIM, "head_dim"),
        ):
            sizes[name] = sizes[default] if given is None else _size(name, given, limit, problems)
        if sizes["heads_q"] and sizes["heads_kv"] and sizes["heads_q"] % sizes["heads_kv"]:
            problems.append(f"heads_kv: got {sizes['heads_kv']}, must divide heads_q = {sizes['heads_q']}")
        _check_name("dtype", dtype, tuple(DTYPES), problems)
        try:
            rule = parse_mask(mask)
            if not problems:
                sizes_of_mask = (sizes["batch"], sizes["seqlen_q"], sizes["seqlen_k"])
                problems += [f"mask: {line}" for line in rule.complaints(*sizes_of_mask)]
        except InputError as error:
            problems += error.problems
        _check_name("direction", direction, DIRECTIONS, problems)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            problems.append(f"dropout: got {_shown(dropout)}, must be a number in [0, 1)")
        if dtype == "fp8" and direction in ("bwd", "fwd+bwd"):
            problems.append(f"direction: got {direction!r}, fp8 has fwd only")
        if problems:
            raise InputError(problems)
        for name, value in (*sizes.items(), ("dtype", dtype), ("mask", mask), ("direction", direction)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dropout", float(dropout))
        object.__setattr__(self, "_mask_rule", rule)

    @property
    def mask_rule(self) -> Mask:
        """What `mask` names, as it was when the problem was made: a block list is a file."""
        return self._mask_rule  # type: ignore[attr-defined, no-any-return]

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share a KV head: query head h reads KV head h // heads_per_kv (GQA; 1 is MHA)."""
        return self.heads_q // self.heads_kv

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of Q, K and V."""
        return DTYPES[self.dtype]

    @property
    def output_dtype(self) -> str:
        """Of O: the inputs' own, and bf16 after fp8."""
        return OUTPUT_DTYPES[self.dtype]

    @property
    def passes(self) -> tuple[str, ...]:
        """`fwd`, `bwd`, or both, in the order in which they run."""
        return tuple(self.direction.split("+"))

    @property
    def pairs(self) -> float:
        """P, the (query, key) pairs per head that FLOP counts use: seqlen_q * seqlen_k for full,
        seqlen_q * (max(0, seqlen_k - seqlen_q) + seqlen_k) / 2 for causal (a convention: it may be half an odd number),
        the allowed pairs for every other mask.
        """
        return self._twice_counted_pairs / 2 / self.batch

    @cached_property
    def _twice_counted_pairs(self) -> int:
        """Per head, summed over the batch."""
        return self._of_all_entries(lambda b: self.mask_rule.twice_counted_pairs(self.seqlen_q, self.seqlen_k, b))

    @cached_property
    def allowed_pairs(self) -> float:
        """Number of (query, key) pairs per head that are not masked; the mean, where batch entries differ."""
        rule = self.mask_rule
        return self._of_all_entries(lambda b: rule.allowed_pairs(self.seqlen_q, self.seqlen_k, b)) / self.batch

    def _q_walks(self, BLOCK_M: int, BLOCK_N: int, batch: int) -> list[KVWalk]:
        """The Q tiles of each KV tile."""
        known: dict[tuple[int, int, int], list[KVWalk]] = self.__dict__.setdefault("_q_walks_known", {})
        key = (BLOCK_M, BLOCK_N, batch)
        if key not in known:
            visitors: list[dict[int, bool]] = [{} for _ in range(num_k_tiles(self, BLOCK_N))]
            for m_block in range(num_q_tiles(self, BLOCK_M)):
                for n_block, partial in kv_tiles(self, m_block, BLOCK_M, BLOCK_N, batch):
                    visitors[n_block][m_block] = partial
            known[key] = [KVWalk.of(tiles) for tiles in visitors]
        return known[key]

    def _of_all_entries(self, count: Callable[[int], int]) -> int:
        """Sum of `count(batch entry)`, asked once where entries do not differ."""
        return sum(map(count, range(self.batch))) if self.mask_rule.by_batch else self.batch * count(0)

    @property
    def flops(self) -> int:
        """2 * batch * heads_q * pairs times head_dim + head_dim_v forward, 3 * head_dim + 2 * head_dim_v backward.

        Backward has five products: S again, dP, dV, dQ and dK.
        """
        return self.heads_q * self._twice_counted_pairs * self.products_depth

    @property
    def products_depth(self) -> int:
        """Multiply-adds of all products for one (query, key) pair."""
        d, dv = self.head_dim, self.head_dim_v
        depth = {"fwd": d + dv, "bwd": 3 * d + 2 * dv}
        return sum(depth[name] for name in self.passes)

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor: q, k, v in the problem's dtype, o in `output_dtype`, lse in fp32; with a backward pass
        also do, dq, dk and dv.
        """
        q_rows = self.batch * self.heads_q * self.seqlen_q
        kv_rows = self.batch * self.heads_kv * self.seqlen_k
        sizes = {
            "q": q_rows * self.head_dim * self.element_bytes,
            "k": kv_rows * self.head_dim * self.element_bytes,
            "v": kv_rows * self.head_dim_v * self.element_bytes,
            "o": q_rows * self.head_dim_v * DTYPES[self.output_dtype],
            "lse": q_rows * LSE_BYTES,
        }
        if "bwd" in self.passes:
            sizes |= {"do": sizes["o"], "dq": sizes["q"], "dk": sizes["k"], "dv": sizes["v"]}
        return sizes

    @property
    def min_hbm_bytes(self) -> int:
        """Least HBM traffic: of each pass, what it is given read once, and what it computes written once. A backward
        pass is given Q, K, V, O, LSE and dO. By tensor: `tensor_bytes`."""
        sizes = self.tensor_bytes
        forward = sum(sizes[name] for name in ("q", "k", "v", "o", "lse"))
        return sum({"fwd": forward, "bwd": sum(sizes.values())}[name] for name in self.passes)

    @property
    def memory_bytes(self) -> int:
        """Device memory that the tensors occupy together."""
        return sum(self.tensor_bytes.values())


def num_q_tiles(problem: AttentionProblem, BLOCK_M: int) -> int:
    """Q tiles of one head, the last one possibly short."""
    return -(-problem.seqlen_q // BLOCK_M)


def kv_tiles(problem: AttentionProblem, m_block: int, BLOCK_M: int, BLOCK_N: int, batch: int = 0) -> KVWalk:
    """The KV tiles that Q tile `m_block` of a head visits: those with at least one allowed pair, last to first.

    A tile is partial if a row of the Q tile below `seqlen_q` does not see a column of it, the columns past `seqlen_k`
    included. Raises ValueError if there is no such Q tile.
    """
    first_row = m_block * BLOCK_M
    if not 0 <= first_row < problem.seqlen_q:
        raise ValueError(f"m_block {m_block} with BLOCK_M {BLOCK_M} is outside of seqlen_q {problem.seqlen_q}")
    rows = range(first_row, min(first_row + BLOCK_M, problem.seqlen_q))
    return problem.mask_rule.walk(rows, BLOCK_N, problem.seqlen_q, problem.seqlen_k, batch)


def num_k_tiles(problem: AttentionProblem, BLOCK_N: int) -> int:
    """KV tiles of one head, the last one possibly short."""
    return -(-problem.seqlen_k // BLOCK_N)


def q_tiles(problem: AttentionProblem, n_block: int, BLOCK_M: int, BLOCK_N: int, batch: int = 0) -> KVWalk:
    """The Q tiles that visit KV tile `n_block` of a head, last to first: `kv_tiles` the other way round.

    Raises ValueError if there is no such KV tile.
    """
    if not 0 <= n_block < num_k_tiles(problem, BLOCK_N):
        raise ValueError(f"n_block {n_block} with BLOCK_N {BLOCK_N} is outside of seqlen_k {problem.seqlen_k}")
    return problem._q_walks(BLOCK_M, BLOCK_N, batch if problem.mask_rule.by_batch else 0)[n_block]


def flops_executed(problem: AttentionProblem, BLOCK_M: int, BLOCK_N: int) -> int:
    """FLOPs of all tiles visited, each counted whole: 2 * BLOCK_M * BLOCK_N * `products_depth`.

    Takes one step per Q tile of a head.
    """
    blocks = range(num_q_tiles(problem, BLOCK_M))
    tiles = problem._of_all_entries(lambda b: sum(kv_tiles(problem, m, BLOCK_M, BLOCK_N, b).count for m in blocks))
    return problem.heads_q * tiles * 2 * BLOCK_M * BLOCK_N * problem.products_depth


def allowed(
    problem: AttentionProblem, rows: NDArray[np.integer], cols: NDArray[np.integer], batch: int = 0
) -> NDArray[np.bool_]:
    """Boolean (len(rows), len(cols)): may query `rows[i]` see key `cols[j]`? Both are 1-D.

    Columns >= seqlen_k are never allowed. Rows >= seqlen_q, which pad the last Q tile, see what the last row sees.
    """
    import numpy as np

    rows = np.minimum(np.asarray(rows), problem.seqlen_q - 1)
    return problem.mask_rule.allowed(rows, np.asarray(cols), problem.seqlen_q, problem.seqlen_k, batch)
