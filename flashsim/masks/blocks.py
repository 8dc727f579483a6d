"""Masks of blocks: what a query sees is decided for whole blocks of queries and keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from flashsim.errors import InputError
from flashsim.masks.base import Mask
from flashsim.masks.walk import KVWalk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class BlockMask(Mask):
    """Queries in rows of `block_q`, keys in columns of `block_k`: a block is seen whole, or not at all."""

    block_q: int
    block_k: int

    @abstractmethod
    def columns(self, row: int, seqlen_q: int, seqlen_k: int) -> frozenset[int]:
        """The blocks of keys that block `row` of queries sees."""

    def walk(self, rows: range, BLOCK_N: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> KVWalk:
        blocks = range(rows[0] // self.block_q, rows[-1] // self.block_q + 1)
        seen = [self.columns(row, seqlen_q, seqlen_k) for row in blocks]
        some, every = frozenset.union(*seen), frozenset.intersection(*seen)
        keys = range(seqlen_k)
        visited = {
            key // BLOCK_N
            for column in some
            for key in (*keys[column * self.block_k : (column + 1) * self.block_k : BLOCK_N],
                        *keys[column * self.block_k : (column + 1) * self.block_k][-1:])
        }  # fmt: skip
        return KVWalk.of({n: not self._whole(n, BLOCK_N, every, seqlen_k) for n in visited})

    def _whole(self, n: int, BLOCK_N: int, every: frozenset[int], seqlen_k: int) -> bool:
        """Whether all rows see all of KV tile `n`."""
        if (n + 1) * BLOCK_N > seqlen_k:
            return False
        return every.issuperset(range(n * BLOCK_N // self.block_k, ((n + 1) * BLOCK_N - 1) // self.block_k + 1))

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int, batch: int = 0
    ) -> NDArray[np.bool_]:
        import numpy as np

        columns = -(-max(seqlen_k, 1 + int(cols.max(initial=0))) // self.block_k)
        blocks = rows // self.block_q
        table = np.zeros((int(blocks.max(initial=0)) + 1, columns), dtype=bool)
        for row in set(blocks.tolist()):
            table[row, [column for column in self.columns(row, seqlen_q, seqlen_k) if column < columns]] = True
        visible: NDArray[np.bool_] = table[blocks][:, cols // self.block_k] & (cols < seqlen_k)
        return visible

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        def size(block: int, width: int, end: int) -> int:
            return max(0, min(width, end - block * width))

        return sum(
            size(row, self.block_q, seqlen_q)
            * sum(size(column, self.block_k, seqlen_k) for column in self.columns(row, seqlen_q, seqlen_k))
            for row in range(-(-seqlen_q // self.block_q))
        )


BUTTERFLY_BLOCK = 16
"""Queries and keys of a block: the rows of one MMA, and of one step of FlashAttention-1."""
BUTTERFLY_KEYS = 330
"""Keys a query, where none are given: what FlashAttention-1's block-sparse times come to, which grow linearly."""


@dataclass(frozen=True)
class Butterfly(BlockMask):
    """Block i of queries sees the blocks i xor d of keys, for as many distances d as make `keys` keys: 0, then the
    powers of two (the factors of a butterfly matrix), then sums of two of them (products of factors), and so on.

    The published block-sparse rows say "butterfly" and state no density; the number of keys is inferred from them.
    """

    kind: ClassVar[str] = "butterfly"
    keys: int = BUTTERFLY_KEYS
    given: bool = True
    """Whether anybody has said how many."""
    block_q: ClassVar[int] = BUTTERFLY_BLOCK  # type: ignore[misc]
    block_k: ClassVar[int] = BUTTERFLY_BLOCK  # type: ignore[misc]

    def __str__(self) -> str:
        return f"butterfly:{self.keys}" if self.given else "butterfly"

    @property
    def assumed(self) -> str | None:
        return None if self.given else f"{self.keys} keys a query, inferred from published times"

    def columns(self, row: int, seqlen_q: int, seqlen_k: int) -> frozenset[int]:
        blocks = -(-seqlen_k // BUTTERFLY_BLOCK)
        own = row * blocks // -(-seqlen_q // BUTTERFLY_BLOCK)  # on the diagonal, whatever the lengths are
        distances = _butterfly_distances(-(-self.keys // BUTTERFLY_BLOCK), blocks)
        return frozenset(own ^ distance for distance in distances if own ^ distance < blocks)


@cache
def _butterfly_distances(count: int, blocks: int) -> tuple[int, ...]:
    """The first `count` distances below the next power of two."""
    size = 1 << (blocks - 1).bit_length()
    return tuple(sorted(range(size), key=lambda distance: (distance.bit_count(), distance))[:count])


@dataclass(frozen=True)
class BlockList(BlockMask):
    """The blocks that a file lists.

    Its first line is `block_q block_k`, two sizes; then comes one line for each block of queries, with the numbers of
    the blocks of keys that it sees, rising, or nothing. `#` begins a comment.
    """

    kind: ClassVar[str] = "blocks"
    path: str
    block_q: int
    block_k: int
    rows: tuple[frozenset[int], ...]

    def __str__(self) -> str:
        return f"blocks:{self.path}"

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        lines = []
        if len(self.rows) != -(-seqlen_q // self.block_q):
            wanted = -(-seqlen_q // self.block_q)
            lines.append(
                f"{self.path} has {len(self.rows)} rows of {self.block_q} queries, and {seqlen_q} queries need {wanted}"
            )
        last = max((max(row, default=-1) for row in self.rows), default=-1)
        if last >= -(-seqlen_k // self.block_k):
            lines.append(f"{self.path} lists block {last} of {self.block_k} keys, there are {seqlen_k} keys")
        return lines

    def columns(self, row: int, seqlen_q: int, seqlen_k: int) -> frozenset[int]:
        return self.rows[row] if row < len(self.rows) else frozenset()


def read_block_list(path: str) -> BlockList:
    """The mask in a file. Raises InputError with one line for each mistake."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"mask: {path} cannot be read: {error}") from None
    numbered = [(number, line.partition("#")[0].split()) for number, line in enumerate(lines, start=1)]
    comments = {number for number, line in enumerate(lines, start=1) if line.lstrip().startswith("#")}
    numbered = [(number, words) for number, words in numbered if number not in comments]
    problems: list[str] = []
    if not numbered:
        raise InputError(f"mask: {path} is empty; its first line must be: block_q block_k")
    sizes = _whole_numbers(path, *numbered[0], problems)
    if not problems and (len(sizes) != 2 or min(sizes) < 1):
        problems.append(f"mask: {path}:{numbered[0][0]}: must be the two sizes of a block, from 1")
    rows = []
    for number, words in numbered[1:]:
        row = _whole_numbers(path, number, words, problems)
        if row != sorted(set(row)):
            problems.append(f"mask: {path}:{number}: the blocks must be rising: {' '.join(words)}")
        rows.append(frozenset(row))
    if problems:
        raise InputError(problems)
    return BlockList(path, sizes[0], sizes[1], tuple(rows))


def _whole_numbers(path: str, line: int, words: Iterable[str], problems: list[str]) -> list[int]:
    wrong = [word for word in words if not (word.isascii() and word.isdigit())]
    problems += [f"mask: {path}:{line}: {word!r} is not a whole number" for word in wrong]
    return [] if wrong else [int(word) for word in words]
