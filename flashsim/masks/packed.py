"""The mask of a problem whose query heads are packed into rows (`flashsim.packing`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashsim.masks.base import Mask
from flashsim.masks.walk import KVWalk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Packed(Mask):
    """Row r sees what query r // `group` sees under `mask`; there are seqlen_q / `group` queries.

    `kind` is that of `mask`; the first word of the text is `packed`.
    """

    group: int
    mask: Mask

    def __str__(self) -> str:
        return f"packed:{self.group}:{self.mask}"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.mask.kind

    @property
    def by_batch(self) -> bool:  # type: ignore[override]
        return self.mask.by_batch

    @property
    def assumed(self) -> str | None:
        return self.mask.assumed

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        if seqlen_q % self.group:
            return [f"{seqlen_q} packed rows are not a multiple of {self.group}, the rows of a query"]
        return self.mask.complaints(batch, seqlen_q // self.group, seqlen_k)

    def allowed(
        self, rows: NDArray[np.integer], cols: NDArray[np.integer], seqlen_q: int, seqlen_k: int, batch: int = 0
    ) -> NDArray[np.bool_]:
        return self.mask.allowed(rows // self.group, cols, seqlen_q // self.group, seqlen_k, batch)

    def walk(self, rows: range, BLOCK_N: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> KVWalk:
        queries = range(rows[0] // self.group, rows[-1] // self.group + 1)
        return self.mask.walk(queries, BLOCK_N, seqlen_q // self.group, seqlen_k, batch)

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        return self.group * self.mask.allowed_pairs(seqlen_q // self.group, seqlen_k, batch)

    def twice_counted_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        return self.group * self.mask.twice_counted_pairs(seqlen_q // self.group, seqlen_k, batch)
