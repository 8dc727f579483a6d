"""Attention masks: which keys a query row sees. A mask is a rule of (row, seqlen_q, seqlen_k) and holds no sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flashsim.errors import InputError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Mask(ABC):
    """Interface of a mask whose rows see the keys 0 .. stop - 1, where `stop` never falls from one row to the next.

    `flashsim.problem.kv_tiles` relies on both properties; a mask without them brings its own walk over the KV tiles.
    """

    name: ClassVar[str]

    @abstractmethod
    def stop(self, row: int, seqlen_q: int, seqlen_k: int) -> int:
        """One past the last key that query `row` sees, 0 <= row < seqlen_q; 0 if it sees none."""

    @abstractmethod
    def allowed_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        """Exact number of (query, key) pairs that are not masked."""

    @abstractmethod
    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        """Twice the number of pairs that FLOP counts use; doubled because the causal convention has halves."""

    @abstractmethod
    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int
    ) -> NDArray[np.bool_]:
        """Boolean (len(rows), len(cols)) from 1-D `rows` and `cols`; a column >= `seqlen_k` is never allowed."""


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    name: ClassVar[str] = "full"

    def stop(self, row: int, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_k

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_q * seqlen_k

    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        return 2 * seqlen_q * seqlen_k

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int
    ) -> NDArray[np.bool_]:
        import numpy as np

        return np.broadcast_to(cols < seqlen_k, (rows.size, cols.size))


@dataclass(frozen=True)
class Causal(Mask):
    """Aligned at the bottom right: row i sees key c iff c <= i + (seqlen_k - seqlen_q), as flash-attn does since 2.1.

    With seqlen_q > seqlen_k the first seqlen_q - seqlen_k rows see nothing.
    """

    name: ClassVar[str] = "causal"

    def stop(self, row: int, seqlen_q: int, seqlen_k: int) -> int:
        return max(row + 1 + seqlen_k - seqlen_q, 0)

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        rows = min(seqlen_q, seqlen_k)
        return rows * max(0, seqlen_k - seqlen_q) + rows * (rows + 1) // 2

    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        # The convention of published TFLOP/s: half of a square, without the half of its diagonal.
        return seqlen_q * (max(0, seqlen_k - seqlen_q) + seqlen_k)

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int
    ) -> NDArray[np.bool_]:
        visible: NDArray[np.bool_] = (cols <= rows[:, None] + (seqlen_k - seqlen_q)) & (cols < seqlen_k)
        return visible


MASKS: dict[str, Mask] = {mask.name: mask for mask in (Full(), Causal())}

# Masks that files of measured rows may name, but that no schedule here can run.
UNSUPPORTED_MASKS = ("window", "prefix", "chunked", "documents", "global", "blocks", "butterfly", "padding")


def parse_mask(text: object) -> Mask:
    """The mask that `text` names: `full` or `causal`.

    Raises InputError: "not supported" for a mask of the file format that does not exist here, else "unknown".
    """
    if not isinstance(text, str):
        raise InputError(f"mask: must be text, got {type(text).__name__} (allowed: {', '.join(MASKS)})")
    if text in MASKS:
        return MASKS[text]
    if text.partition(":")[0] in UNSUPPORTED_MASKS:
        raise InputError(f"mask: {text!r} is not supported (allowed: {', '.join(MASKS)})")
    raise InputError(f"mask: {unknown('mask', text, MASKS)}")
