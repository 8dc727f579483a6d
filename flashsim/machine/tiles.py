"""Tiles of the tensors in HBM, and the work tiles of a grid."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashsim.machine.buffers import ELEMENT_BYTES
from flashsim.problem import AttentionProblem, KVWalk, kv_tiles

Coordinates = tuple[int, int, int]
"""(m_block, head, batch) of a work tile."""


class Shortened(NamedTuple):
    """A work tile at `where` that visits the KV tiles of `walk` instead of its own."""

    where: Coordinates
    walk: KVWalk


class HbmTile:
    """`count` rows from `start` of one head of a tensor; rows past its end are zero when read and dropped when written.

    `key` names the block that it is, or is a part of, for the L2 cache.
    """

    __slots__ = ("batch", "count", "dtype", "head", "key", "limit", "place", "shape", "start", "tensor")

    def __init__(
        self, tensor: str, batch: int, head: int, start: int, count: int, limit: int, width: int, dtype: str
    ) -> None:
        self.tensor = tensor
        self.batch = batch
        self.head = head
        self.start = start
        self.count = count
        self.limit = limit
        """Rows that the tensor has: this tile's rows from there on do not exist."""
        self.shape = (count, width)
        self.dtype = dtype
        self.place = "hbm"
        self.key = (tensor, batch, head, start, count)

    def rows(self, start: int, count: int) -> HbmTile:
        if start == 0 and count == self.count:
            return self
        width = self.shape[1]
        return HbmTile(self.tensor, self.batch, self.head, self.start + start, count, self.limit, width, self.dtype)

    @property
    def size_byte(self) -> int:
        """Bytes that exist and have to be moved."""
        exist = min(self.count, self.limit - self.start)
        return max(exist, 0) * self.shape[1] * ELEMENT_BYTES[self.dtype]

    @property
    def full_byte(self) -> int:
        """Bytes of a tile of this shape that lies within its tensor."""
        return self.count * self.shape[1] * ELEMENT_BYTES[self.dtype]

    def read(self, tensors: dict[str, Any]) -> Any:
        """The numbers, float64 (count, width); rows that do not exist are zero, as TMA fills them."""
        import numpy as np

        array = np.zeros(self.shape)
        there = tensors[self.tensor][self.batch, self.start : min(self.start + self.count, self.limit), self.head]
        array[: len(there)] = there.reshape(len(there), self.shape[1])
        return array

    def write(self, tensors: dict[str, Any], array: Any) -> None:
        """Store `array` (count, width); rows that do not exist are dropped."""
        target = tensors[self.tensor]
        stop = min(self.start + self.count, self.limit)
        if stop > self.start:
            shape = target[self.batch, self.start : stop, self.head].shape
            target[self.batch, self.start : stop, self.head] = array[: stop - self.start].reshape(shape)

    def __str__(self) -> str:
        return f"{self.tensor}(batch {self.batch}, head {self.head}, rows {self.start} to {self.start + self.count - 1})"


class WorkTile:
    """One block of queries of one head, and the KV tiles that it visits."""

    __slots__ = (
        "LSE", "O", "Q", "_walk", "batch", "block_n", "count", "first", "head", "index", "last", "m_block", "problem", "row0",
    )  # fmt: skip

    def __init__(
        self,
        problem: AttentionProblem,
        where: Coordinates,
        BLOCK_M: int,
        BLOCK_N: int,
        index: int,
        first: int,
        walk: KVWalk | None = None,
    ) -> None:
        """`index` non-empty work tiles and `first` KV tiles came before this one in its CTA; `walk` replaces the KV tiles
        that the problem's mask gives it."""
        p = problem
        self.problem = p
        self.m_block, self.head, self.batch = where
        self.block_n = BLOCK_N
        self.row0 = self.m_block * BLOCK_M
        self._walk = walk or kv_tiles(p, self.m_block, BLOCK_M, BLOCK_N)
        self.index = index
        self.first = first
        self.count = self._walk.count
        self.last = first + self.count - 1
        query = (self.batch, self.head, self.row0, BLOCK_M, p.seqlen_q)
        self.Q = HbmTile("Q", *query, p.head_dim, p.dtype)
        self.O = HbmTile("O", *query, p.head_dim_v, p.dtype)
        self.LSE = HbmTile("LSE", *query, 1, "fp32")

    def _keys(self, tensor: str, j: int, width: int) -> HbmTile:
        p, block = self.problem, self.block(j)
        head = self.head // p.heads_per_kv
        return HbmTile(tensor, self.batch, head, block * self.block_n, self.block_n, p.seqlen_k, width, p.dtype)

    def block(self, j: int) -> int:
        """Which block of keys KV tile j is."""
        return self._walk.first - (j - self.first)

    def K(self, j: int) -> HbmTile:  # noqa: N802 - the paper's name
        return self._keys("K", j, self.problem.head_dim)

    def V(self, j: int) -> HbmTile:  # noqa: N802
        return self._keys("V", j, self.problem.head_dim_v)

    def partial(self, j: int) -> bool:
        return j - self.first < self._walk.partial

    @property
    def partial_count(self) -> int:
        """How many of the KV tiles, the first ones, need masking."""
        return self._walk.partial

    def __str__(self) -> str:
        return f"query block {self.m_block} of head {self.head}, batch {self.batch}"
