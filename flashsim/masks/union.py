"""Global tokens beside a window (Longformer, arXiv 2004.05150; BigBird, arXiv 2007.14062)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flashsim.masks.base import Mask
from flashsim.masks.intervals import Window
from flashsim.masks.walk import KVWalk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GlobalWindow(Mask):
    """A window; and the first `tokens` keys are seen by every query, and the first `tokens` queries see every key."""

    kind: ClassVar[str] = "global"
    tokens: int
    window: Window

    def __str__(self) -> str:
        return f"global:{self.tokens}+{self.window}"

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int, batch: int = 0
    ) -> NDArray[np.bool_]:
        everywhere = (rows[:, None] < self.tokens) | (cols < self.tokens)
        near = self.window.allowed(rows, cols, seqlen_q, seqlen_k)
        visible: NDArray[np.bool_] = (everywhere | near) & (cols < seqlen_k)
        return visible

    def walk(self, rows: range, BLOCK_N: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> KVWalk:
        local = range(max(rows[0], self.tokens), rows[-1] + 1)
        blocks = set(self.window.walk(rows, BLOCK_N, seqlen_q, seqlen_k).blocks)
        blocks |= set(range(-(-min(self.tokens, seqlen_k) // BLOCK_N)))
        if rows[0] < self.tokens:
            blocks = set(range(-(-seqlen_k // BLOCK_N)))

        def whole(block: int) -> bool:
            start, stop = max(block * BLOCK_N, self.tokens), (block + 1) * BLOCK_N
            if stop > seqlen_k or not local or start >= stop:
                return stop <= seqlen_k
            latest = self.window.interval(local[-1], seqlen_q, seqlen_k)
            earliest = self.window.interval(local[0], seqlen_q, seqlen_k)
            return latest[0] <= start and stop <= earliest[1]

        return KVWalk.of({block: not whole(block) for block in blocks})

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        tokens = min(self.tokens, seqlen_k)
        pairs = min(self.tokens, seqlen_q) * seqlen_k
        for row in range(self.tokens, seqlen_q):
            start, stop = self.window.interval(row, seqlen_q, seqlen_k)
            pairs += tokens + max(0, stop - max(start, tokens))
        return pairs
