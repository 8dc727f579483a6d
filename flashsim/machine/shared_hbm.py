"""Who touched which part of a tensor in HBM, during one kernel: CTAs meet there, and nothing orders them."""

from __future__ import annotations

from flashsim.engine import Memory
from flashsim.machine.tiles import HbmTile

INPUTS = ("Q", "K", "V")
"""No kernel writes them, so that reading them is no race."""


class SharedHbm:
    """The accesses to the outputs of a kernel, by tensor, head and columns. Two kernels never overlap."""

    def __init__(self) -> None:
        self._heads: dict[tuple[str, int, int], dict[tuple[int, int], Memory]] = {}

    def of(self, tile: HbmTile) -> list[Memory]:
        """The records of all columns that `tile` shares with others; rows are for the accesses to tell apart."""
        columns = self._heads.setdefault((tile.tensor, tile.batch, tile.head), {})
        mine = tile.column_span
        beside = [memory for span, memory in columns.items() if span[0] < mine[1] and mine[0] < span[1]]
        if mine not in columns:
            columns[mine] = Memory(f"{tile.tensor} of batch {tile.batch}, head {tile.head}")
            for memory in beside:  # what was done to a part of these columns was done to them
                columns[mine].writes += memory.writes
                columns[mine].reads += memory.reads
            beside.append(columns[mine])
        return beside
