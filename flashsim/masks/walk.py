"""The KV tiles that one Q tile visits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVWalk:
    """Blocks of keys in the order in which they are visited: from the last to the first, as FlashAttention-2 and -3 do.

    The first `partial` tiles and the last `partial_end` need masking, those between them do not. Where tiles that need
    masking lie among others, as block lists may have them, they come first. Iterating gives (block, is_partial).
    """

    blocks: Sequence[int]
    partial: int
    partial_end: int = 0

    @classmethod
    def of(cls, tiles: dict[int, bool]) -> KVWalk:
        """The walk over the blocks that are keys of `tiles`; the value is whether a block needs masking."""
        order = sorted(tiles, reverse=True)
        whole = [step for step, block in enumerate(order) if not tiles[block]]
        if not whole:
            return cls(order, len(order))
        if all(not tiles[block] for block in order[whole[0] : whole[-1] + 1]):
            return cls(order, whole[0], len(order) - 1 - whole[-1])
        return cls(sorted(order, key=lambda block: not tiles[block]), len(order) - len(whole))

    @property
    def count(self) -> int:
        return len(self.blocks)

    @property
    def first(self) -> int:
        """The block that is visited first; -1 if there is none."""
        return self.blocks[0] if self.blocks else -1

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        return ((block, self.is_partial(step)) for step, block in enumerate(self.blocks))

    def block(self, step: int) -> int:
        """Block index of the tile visited at `step`, 0 <= step < count."""
        return self.blocks[step]

    def is_partial(self, step: int) -> bool:
        """Whether the tile visited at `step` needs masking."""
        return step < self.partial or step >= len(self.blocks) - self.partial_end
