"""Masks whose rows see the keys of one interval, which never moves back from one row to the next."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

from flashsim.masks.base import Mask
from flashsim.masks.walk import KVWalk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class IntervalMask(Mask):
    """Row i sees the keys `start` to `stop` - 1. Neither falls from one row to the next, and no key between two rows'
    intervals is left out."""

    @abstractmethod
    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        """(start, stop) of query `row`, within 0 .. seqlen_k; empty if start >= stop."""

    def walk(self, rows: range, BLOCK_N: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> KVWalk:
        first = self.interval(rows[0], seqlen_q, seqlen_k, batch)
        last = self.interval(rows[-1], seqlen_q, seqlen_k, batch)
        start, stop = first[0] // BLOCK_N, -(-last[1] // BLOCK_N)
        if last[1] <= first[0] or stop <= start:
            return KVWalk((), 0)
        # Whole tiles are those that the last row sees from their start and the first row sees to their end.
        whole_start, whole_stop = -(-last[0] // BLOCK_N), first[1] // BLOCK_N
        blocks = range(stop - 1, start - 1, -1)
        if whole_stop <= whole_start:
            return KVWalk(blocks, len(blocks))
        return KVWalk(blocks, stop - whole_stop, whole_start - start)

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int, batch: int = 0
    ) -> NDArray[np.bool_]:
        import numpy as np

        bounds = np.array([self.interval(int(row), seqlen_q, seqlen_k, batch) for row in rows]).reshape(-1, 2)
        visible: NDArray[np.bool_] = (bounds[:, :1] <= cols) & (cols < bounds[:, 1:]) & (cols < seqlen_k)
        return visible

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        intervals = (self.interval(row, seqlen_q, seqlen_k, batch) for row in range(seqlen_q))
        return sum(max(0, stop - start) for start, stop in intervals)


@dataclass(frozen=True)
class Full(IntervalMask):
    """Every query sees every key."""

    kind: ClassVar[str] = "full"

    def __str__(self) -> str:
        return "full"

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        return 0, seqlen_k

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        return seqlen_q * seqlen_k


@dataclass(frozen=True)
class Causal(IntervalMask):
    """Aligned at the bottom right: row i sees key c iff c <= i + (seqlen_k - seqlen_q), as flash-attn does since 2.1.

    With seqlen_q > seqlen_k the first seqlen_q - seqlen_k rows see nothing.
    """

    kind: ClassVar[str] = "causal"

    def __str__(self) -> str:
        return "causal"

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        return 0, min(max(row + 1 + seqlen_k - seqlen_q, 0), seqlen_k)

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        rows = min(seqlen_q, seqlen_k)
        return rows * max(0, seqlen_k - seqlen_q) + rows * (rows + 1) // 2

    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        # The convention of published TFLOP/s: half of a square, without the half of its diagonal.
        return seqlen_q * (max(0, seqlen_k - seqlen_q) + seqlen_k)


@dataclass(frozen=True)
class Window(IntervalMask):
    """Row i sees the keys p - left .. p + right around its own position p = i + (seqlen_k - seqlen_q)."""

    kind: ClassVar[str] = "window"
    left: int
    right: int = 0

    def __str__(self) -> str:
        return f"window:{self.left},{self.right}"

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        position = row + seqlen_k - seqlen_q
        return min(max(position - self.left, 0), seqlen_k), min(max(position + self.right + 1, 0), seqlen_k)


@dataclass(frozen=True)
class Prefix(IntervalMask):
    """Causal, but the first `keys` keys are seen by every query (prefix LM)."""

    kind: ClassVar[str] = "prefix"
    keys: int

    def __str__(self) -> str:
        return f"prefix:{self.keys}"

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        return 0, min(max(row + 1 + seqlen_k - seqlen_q, self.keys), seqlen_k)


@dataclass(frozen=True)
class Chunked(IntervalMask):
    """Queries and keys are cut into chunks of `size`, from the first; a query sees the keys of its own chunk."""

    kind: ClassVar[str] = "chunked"
    size: int

    def __str__(self) -> str:
        return f"chunked:{self.size}"

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        start = row // self.size * self.size
        return min(start, seqlen_k), min(start + self.size, seqlen_k)


@dataclass(frozen=True)
class Documents(IntervalMask):
    """Sequences packed one after the other; a query sees the keys of its own."""

    kind: ClassVar[str] = "documents"
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return "documents:" + "+".join(map(str, self.lengths))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.lengths))

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        total = sum(self.lengths)
        if total == seqlen_q == seqlen_k:
            return []
        return [
            f"the documents have {total} tokens, not as many as there are queries ({seqlen_q}) and keys ({seqlen_k})"
        ]

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        number = bisect_right(self._ends, row)
        return self._ends[number] - self.lengths[number], self._ends[number]
