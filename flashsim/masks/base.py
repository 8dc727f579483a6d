"""What a mask is: which keys a query sees, and which KV tiles a tile of queries visits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from flashsim.masks.walk import KVWalk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Mask(ABC):
    """A rule of (row, seqlen_q, seqlen_k), and of the batch entry where sequences differ."""

    kind: ClassVar[str]
    """The first word of its text."""
    by_batch: ClassVar[bool] = False
    """Whether batch entries differ."""

    @property
    def assumed(self) -> str | None:
        """What its text leaves open, and what is taken for it."""
        return None

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        """Why the mask does not go with a problem of these sizes, one line each."""
        return []

    @abstractmethod
    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int, batch: int = 0
    ) -> NDArray[np.bool_]:
        """Boolean (len(rows), len(cols)) from 1-D `rows` and `cols`; a column >= `seqlen_k` is never allowed."""

    @abstractmethod
    def walk(self, rows: range, BLOCK_N: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> KVWalk:
        """The KV tiles that a Q tile of these rows, all below `seqlen_q`, visits: those with an allowed pair.

        A tile is partial if one of the rows does not see one of its columns, those past `seqlen_k` included.
        """

    @abstractmethod
    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        """Exact number of (query, key) pairs of one batch entry that are not masked."""

    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        """Twice the number of pairs that FLOP counts use; doubled because the causal convention has halves."""
        return 2 * self.allowed_pairs(seqlen_q, seqlen_k, batch)
