"""Masks with a length for each batch entry."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from flashsim.masks.intervals import IntervalMask

PADDING_SEED = 2205_14135
MOST_PADDING = 20
"""FlashAttention's benchmark of 2022 draws key lengths from [seqlen - 20, seqlen)."""


@dataclass(frozen=True)
class Padding(IntervalMask):
    """Each batch entry has its own number of keys; without numbers, drawn from [seqlen_k - 20, seqlen_k)."""

    kind: ClassVar[str] = "padding"
    by_batch: ClassVar[bool] = True
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "padding" + (":" + ",".join(map(str, self.lengths)) if self.lengths else "")

    @property
    def assumed(self) -> str | None:
        return (
            None if self.lengths else f"key lengths drawn from [seqlen_k - {MOST_PADDING}, seqlen_k), always the same"
        )

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        lines = []
        if self.lengths and len(self.lengths) != batch:
            lines.append(f"padding has {len(self.lengths)} lengths, the batch has {batch} entries")
        longest = max(self.lengths, default=0)
        if longest > seqlen_k:
            lines.append(f"padding has a length of {longest}, there are {seqlen_k} keys")
        return lines

    def length(self, seqlen_k: int, batch: int) -> int:
        """Keys of this batch entry."""
        if self.lengths:
            return self.lengths[batch]
        return Random(PADDING_SEED * 1009 + batch).randrange(max(0, seqlen_k - MOST_PADDING), seqlen_k)

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        return 0, self.length(seqlen_k, batch)


@dataclass(frozen=True)
class Varlen(IntervalMask):
    """Self-attention of sequences of different lengths: of batch entry b only the first `lengths[b]` queries and keys
    exist. Later rows see nothing: their O is 0, their LSE -inf, and a Q tile of such rows alone visits no KV tile.

    A Q tile with rows on both sides of the end has partial tiles only.
    """

    kind: ClassVar[str] = "varlen"
    by_batch: ClassVar[bool] = True
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:" + ",".join(map(str, self.lengths))

    def complaints(self, batch: int, seqlen_q: int, seqlen_k: int) -> list[str]:
        lines = []
        if len(self.lengths) != batch:
            lines.append(f"{self.kind} has {len(self.lengths)} lengths, the batch has {batch} entries")
        longest = max(self.lengths, default=0)
        if longest > min(seqlen_q, seqlen_k):
            lines.append(f"{self.kind} has a length of {longest}, there are {seqlen_q} queries and {seqlen_k} keys")
        return lines

    def interval(self, row: int, seqlen_q: int, seqlen_k: int, batch: int = 0) -> tuple[int, int]:
        length = self.lengths[batch]
        # Where nothing is seen, the interval is empty at the end of the sequence, so that neither bound ever falls.
        return (0, self._stop(row, length)) if row < length else (length, length)

    def _stop(self, row: int, length: int) -> int:
        """The keys that query `row` of a sequence sees."""
        return length

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        return self.lengths[batch] ** 2


@dataclass(frozen=True)
class VarlenCausal(Varlen):
    """`Varlen`, and key <= query.

    FLOP counts use the allowed pairs, LEN * (LEN + 1) / 2 of each entry, unlike those of `causal`, whose convention
    leaves out half of the diagonal.
    """

    kind: ClassVar[str] = "varlen-causal"

    def _stop(self, row: int, length: int) -> int:
        return row + 1

    def allowed_pairs(self, seqlen_q: int, seqlen_k: int, batch: int = 0) -> int:
        return self.lengths[batch] * (self.lengths[batch] + 1) // 2
