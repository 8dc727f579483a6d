"""Tiles of the tensors in HBM, and the work tiles of a grid."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashsim.machine.buffers import ELEMENT_BYTES, check_rows
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem, kv_tiles
from flashsim.schedules.base import Kernel

Coordinates = tuple[int, int, int]
"""(m_block, head, batch) of a work tile."""


class Shortened(NamedTuple):
    """A work tile at `where` that visits the KV tiles of `walk` instead of its own."""

    where: Coordinates
    walk: KVWalk


class HbmTile:
    """Rows and columns of one head of a tensor; what lies past its end is zero when read and dropped when written.

    `key` names the block that it is, or is a part of, for the L2 cache.
    """

    __slots__ = ("batch", "dtype", "end", "head", "key", "origin", "place", "shape", "tensor")

    def __init__(
        self,
        tensor: str,
        batch: int,
        head: int,
        origin: tuple[int, int],
        shape: tuple[int, int],
        end: tuple[int, int],
        dtype: str,
    ) -> None:
        """`origin` is the first row and column, `end` the rows and columns that the tensor has."""
        self.tensor = tensor
        self.batch = batch
        self.head = head
        self.origin = origin
        self.shape = shape
        self.end = end
        self.dtype = dtype
        self.place = "hbm"
        self.key = (tensor, batch, head, *origin)

    def rows(self, start: int, count: int) -> HbmTile:
        check_rows(start, count, self.shape[0])
        if start == 0 and count == self.shape[0]:
            return self
        origin = (self.origin[0] + start, self.origin[1])
        return HbmTile(self.tensor, self.batch, self.head, origin, (count, self.shape[1]), self.end, self.dtype)

    @property
    def _exist(self) -> tuple[int, int]:
        """Rows and columns of this tile that lie within the tensor."""
        rows, columns = (
            max(0, min(n, e - o)) if o >= 0 else 0 for n, e, o in zip(self.shape, self.end, self.origin, strict=True)
        )
        return rows, columns

    @property
    def row_span(self) -> tuple[int, int]:
        """The tensor's rows that this tile covers."""
        return self.origin[0], self.origin[0] + self._exist[0]

    @property
    def column_span(self) -> tuple[int, int]:
        """The tensor's columns that this tile covers."""
        return self.origin[1], self.origin[1] + self._exist[1]

    @property
    def size_byte(self) -> int:
        """Bytes that exist and have to be moved."""
        rows, columns = self._exist
        return rows * columns * ELEMENT_BYTES[self.dtype]

    @property
    def full_byte(self) -> int:
        """Bytes of a tile of this shape that lies within its tensor."""
        return self.shape[0] * self.shape[1] * ELEMENT_BYTES[self.dtype]

    def _part(self, tensors: dict[str, Any]) -> Any:
        """The view of the tensor that this tile covers, (rows, columns)."""
        (rows, columns), (row, column) = self._exist, self.origin
        head = tensors[self.tensor][self.batch, row : row + rows, self.head]
        return (head[:, None] if head.ndim == 1 else head)[:, column : column + columns]

    def read(self, tensors: dict[str, Any]) -> Any:
        """The numbers, float64 `shape`; what does not exist is zero, as TMA fills it."""
        import numpy as np

        array = np.zeros(self.shape)
        rows, columns = self._exist
        array[:rows, :columns] = self._part(tensors)
        return array

    def write(self, tensors: dict[str, Any], array: Any) -> None:
        """Store `array` (`shape`); what does not exist is dropped."""
        rows, columns = self._exist
        self._part(tensors)[...] = array[:rows, :columns]

    def __str__(self) -> str:
        (row, column), (rows, columns) = self.origin, self.shape
        which = f", columns {column} to {column + columns - 1}" if columns < self.end[1] else ""
        return f"{self.tensor}(batch {self.batch}, head {self.head}, rows {row} to {row + rows - 1}{which})"


def walk_of(kernel: Kernel, problem: AttentionProblem, m_block: int, batch: int = 0) -> KVWalk:
    """The KV tiles that `kernel` visits for query block `m_block` of a head of this batch entry."""
    every = range(-(-problem.seqlen_k // kernel.BLOCK_N))
    if kernel.dense and not kernel.masks:
        return KVWalk(every[::-1], 0)
    walk = kv_tiles(problem, m_block, kernel.BLOCK_M, kernel.BLOCK_N, batch)
    if not kernel.dense:
        return walk
    return KVWalk.of(dict.fromkeys(every, True) | dict(walk))


class WorkTile:
    """One block of queries of one head, and the KV tiles that it visits."""

    __slots__ = (
        "LSE", "O", "Q", "_walk", "batch", "block_n", "count", "first", "head", "index", "last", "m_block", "problem",
        "row0",
    )  # fmt: skip

    def __init__(
        self,
        problem: AttentionProblem,
        kernel: Kernel,
        where: Coordinates | Shortened,
        index: int,
        first: int,
    ) -> None:
        """`index` non-empty work tiles and `first` KV tiles came before this one in its CTA."""
        p = self.problem = problem
        if isinstance(where, Shortened):
            (self.m_block, self.head, self.batch), self._walk = where
        else:
            self.m_block, self.head, self.batch = where
            self._walk = walk_of(kernel, p, self.m_block, self.batch)
        self.block_n = kernel.BLOCK_N
        self.row0 = self.m_block * kernel.BLOCK_M
        self.index = index
        self.first = first
        self.count = self._walk.count
        self.last = first + self.count - 1
        self.Q = self._queries("Q", kernel.BLOCK_M, p.head_dim, p.dtype)
        self.O = self._queries("O", kernel.BLOCK_M, p.head_dim_v, p.dtype)
        self.LSE = self._queries("LSE", kernel.BLOCK_M, 1, "fp32")

    def _queries(self, tensor: str, rows: int, width: int, dtype: str) -> HbmTile:
        end = (self.problem.seqlen_q, width)
        return HbmTile(tensor, self.batch, self.head, (self.row0, 0), (rows, width), end, dtype)

    def _keys(self, tensor: str, j: int, width: int) -> HbmTile:
        p = self.problem
        origin, shape, end = (self.block(j) * self.block_n, 0), (self.block_n, width), (p.seqlen_k, width)
        return HbmTile(tensor, self.batch, self.head // p.heads_per_kv, origin, shape, end, p.dtype)

    def _scores(self, tensor: str, j: int) -> HbmTile:
        p = self.problem
        origin, shape = (self.row0, self.block(j) * self.block_n), (self.Q.shape[0], self.block_n)
        return HbmTile(tensor, self.batch, self.head, origin, shape, (p.seqlen_q, p.seqlen_k), p.dtype)

    def block(self, j: int) -> int:
        """Which block of keys KV tile j is. Raises IndexError if it is none of this work tile's."""
        if not self.first <= j <= self.last:
            raise IndexError(f"KV tile {j} is none of this work tile's, which are {self.first} to {self.last}")
        return self._walk.block(j - self.first)

    def K(self, j: int) -> HbmTile:  # noqa: N802 - the paper's name
        return self._keys("K", j, self.problem.head_dim)

    def V(self, j: int) -> HbmTile:  # noqa: N802
        return self._keys("V", j, self.problem.head_dim_v)

    def S(self, j: int) -> HbmTile:  # noqa: N802
        return self._scores("S", j)

    def P(self, j: int) -> HbmTile:  # noqa: N802
        return self._scores("P", j)

    def partial(self, j: int) -> bool:
        return self._walk.is_partial(j - self.first)

    def __str__(self) -> str:
        return f"query block {self.m_block} of head {self.head}, batch {self.batch}"
