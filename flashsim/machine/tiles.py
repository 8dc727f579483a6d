"""Tiles of the tensors in HBM, and the work tiles of a grid."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from flashsim.machine.buffers import check_range
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem, kv_tiles, num_k_tiles, num_q_tiles, q_tiles
from flashsim.schedules.base import Kernel
from flashsim.schedules.tensors import WIDTHS


class Coordinates(NamedTuple):
    """Where a work tile lies."""

    block: int
    """Of queries or of keys: what the kernel's grid is over."""
    head: int
    """A query head or a KV head, likewise."""
    batch: int
    split: int = 0


class Shortened(NamedTuple):
    """A work tile at `where` that visits the tiles of `walk` instead of its own."""

    where: Coordinates
    walk: KVWalk


class HbmTile:
    """Rows and columns of one head of a tensor; what lies past its end is zero when read and dropped when written.

    `key` names the block that it is, or is a part of, for the L2 cache.
    """

    __slots__ = ("batch", "dtype", "end", "head", "key", "origin", "place", "shape", "split", "tensor")

    def __init__(
        self,
        tensor: str,
        batch: int,
        head: int,
        origin: tuple[int, int],
        shape: tuple[int, int],
        end: tuple[int, int],
        dtype: str,
        split: int = 0,
    ) -> None:
        """`origin` is the first row and column, `end` the rows and columns that the tensor has."""
        self.tensor = tensor
        self.batch = batch
        self.head = head
        self.origin = origin
        self.shape = shape
        self.end = end
        self.dtype = dtype
        self.split = split
        self.place = "hbm"
        self.key = (tensor, batch, head, *origin, split)

    def rows(self, start: int, count: int) -> HbmTile:
        check_range("rows", start, count, self.shape[0])
        return self._narrowed(0, start, count)

    def columns(self, start: int, count: int) -> HbmTile:
        check_range("columns", start, count, self.shape[1])
        return self._narrowed(1, start, count)

    def _narrowed(self, axis: int, start: int, count: int) -> HbmTile:
        if count == self.shape[axis]:
            return self
        (row, column), (rows, columns) = self.origin, self.shape
        origin, shape = (
            ((row + start, column), (count, columns)) if axis == 0 else ((row, column + start), (rows, count))
        )
        return HbmTile(self.tensor, self.batch, self.head, origin, shape, self.end, self.dtype, self.split)

    @property
    def _exist(self) -> tuple[int, int]:
        """Rows and columns of this tile that lie within the tensor."""
        rows, columns = (
            max(0, min(n, e - o)) if o >= 0 else 0 for n, e, o in zip(self.shape, self.end, self.origin, strict=True)
        )
        return rows, columns

    @property
    def part(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tensor's rows, and columns, that this tile covers."""
        (row, column), (rows, columns) = self.origin, self._exist
        return (row, row + rows), (column, column + columns)

    @property
    def size_byte(self) -> int:
        """Bytes that exist and have to be moved."""
        rows, columns = self._exist
        return rows * columns * WIDTHS[self.dtype]

    @property
    def full_byte(self) -> int:
        """Bytes of a tile with as many rows and columns that lies within its tensor."""
        rows, columns = (min(n, e) for n, e in zip(self.shape, self.end, strict=True))
        return rows * columns * WIDTHS[self.dtype]

    def _part(self, tensors: dict[str, Any]) -> Any:
        """The view of the tensor that this tile covers, (rows, columns)."""
        rows, columns = self.part
        tensor = tensors[self.tensor]
        head = (tensor[self.split] if tensor.ndim == 5 else tensor)[self.batch, slice(*rows), self.head]
        return (head[:, None] if head.ndim == 1 else head)[:, slice(*columns)]

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


def walk_of(kernel: Kernel, problem: AttentionProblem, where: Coordinates) -> KVWalk:
    """The tiles of the inner loop that `kernel` visits for the work tile at `where`."""
    M, N, over_queries = kernel.BLOCK_M, kernel.BLOCK_N, kernel.grid.over == "queries"
    if kernel.walk == "none":
        return KVWalk((), 0)
    every = range(num_k_tiles(problem, N) if over_queries else num_q_tiles(problem, M))
    if kernel.walk == "all" and not kernel.masks:
        walk = KVWalk(every[::-1], 0)
    else:
        walk = (kv_tiles if over_queries else q_tiles)(problem, where.block, M, N, where.batch)
        if kernel.walk == "all":
            walk = KVWalk.of(dict.fromkeys(every, True) | dict(walk))
    return walk if kernel.grid.splits is None else _split(walk, where.split, kernel.grid.splits)


def _split(walk: KVWalk, split: int, splits: int) -> KVWalk:
    """Part number `split` of `splits` of a walk; the last ones may be shorter, or empty."""
    each = -(-walk.count // splits)
    begin, end = min(split * each, walk.count), min((split + 1) * each, walk.count)
    partial_from = walk.count - walk.partial_end
    partial, partial_end = (max(0, min(n, end - begin)) for n in (walk.partial - begin, end - partial_from))
    return KVWalk(walk.blocks[begin:end], partial, partial_end)


def outer_blocks(kernel: Kernel, problem: AttentionProblem) -> int:
    """Blocks of one head that the grid is over."""
    if kernel.grid.over == "queries":
        return num_q_tiles(problem, kernel.BLOCK_M)
    return num_k_tiles(problem, kernel.BLOCK_N)


class WorkTile:
    """A block of queries, or of keys, of one head, and the tiles that it visits.

    A tensor is an attribute: the part of it that belongs to the work tile, or a function of what the work tile does not
    fix (schedules.tensors).
    """

    def __init__(
        self,
        problem: AttentionProblem,
        kernel: Kernel,
        where: Coordinates | Shortened,
        index: int,
        first: int,
    ) -> None:
        """`index` non-empty work tiles and `first` tiles of the inner loop came before this one in its CTA."""
        self.problem = problem
        self.kernel = kernel
        self.where, self._walk = (
            where if isinstance(where, Shortened) else (where, walk_of(kernel, problem, where))
        )  # fmt: skip
        self.index = index
        self.first = first
        self.count = self._walk.count
        self.last = first + self.count - 1

    def block(self, j: int) -> int:
        """Which block tile j of the inner loop is. Raises IndexError if it is none of this work tile's."""
        if not self.first <= j <= self.last:
            kind = "KV" if self.kernel.grid.over == "queries" else "Q"
            raise IndexError(f"{kind} tile {j} is none of this work tile's, which are {self.first} to {self.last}")
        return self._walk.block(j - self.first)

    def origin(self, j: int) -> tuple[int, int]:
        """The first query and the first key of the scores of tile j."""
        inner, outer = self.block(j), self.where.block
        m, n = (outer, inner) if self.kernel.grid.over == "queries" else (inner, outer)
        return m * self.kernel.BLOCK_M, n * self.kernel.BLOCK_N

    def partial(self, j: int) -> bool:
        return self._walk.is_partial(j - self.first)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as when it is copied
            raise AttributeError(name)
        free = self.kernel.arguments(name)
        found: Any = partial(self._part, name, free) if free else self._part(name, free)
        self.__dict__[name] = found
        return found

    def _part(self, name: str, free: tuple[str, ...], *given: int) -> HbmTile:
        """The part of a tensor that belongs to this work tile, and to what is `given` of the `free` axes."""
        if len(given) != len(free):
            raise TypeError(f"{name} of a work tile takes {len(free)} numbers ({', '.join(free)}), got {len(given)}")
        chosen = dict(zip(free, given, strict=True))
        p, k, where = self.problem, self.kernel, self.where
        tensor = k.tensor(name)
        if tensor.heads == "kv":
            head = where.head // p.heads_per_kv if k.grid.heads == "q" else where.head
        else:
            head = where.head * p.heads_per_kv + chosen["head"] if "head" in chosen else where.head
        inner = self.block(chosen["block"]) if "block" in chosen else 0
        m, n = (where.block, inner) if k.grid.over == "queries" else (inner, where.block)
        widths = {**dict(zip(("head_dim", "head_dim_v"), k.widths(p), strict=True)), "one": 1}
        rows = k.BLOCK_M if tensor.rows == "queries" else k.BLOCK_N
        columns = k.BLOCK_N if tensor.columns == "keys" else widths[tensor.columns]
        origin = ((m if tensor.rows == "queries" else n) * rows, n * columns if tensor.columns == "keys" else 0)
        _, length, _, width = tensor.shape(p)
        split = chosen.get("split", where.split) if tensor.splits else 0
        return HbmTile(
            name, where.batch, head, origin, (rows, columns), (length, width), tensor.dtype_of(p), split
        )  # fmt: skip

    def __str__(self) -> str:
        what = "query" if self.kernel.grid.over == "queries" else "key"
        return f"{what} block {self.where.block} of head {self.where.head}, batch {self.where.batch}"
