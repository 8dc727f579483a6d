"""Who touched which part of a tensor in HBM, during one kernel: CTAs meet there, and nothing orders them."""

from __future__ import annotations

from flashsim.engine import Memory
from flashsim.machine.tiles import HbmTile


class SharedHbm:
    """The accesses to what a kernel writes, by tensor and head. Two kernels never overlap."""

    def __init__(self) -> None:
        self._heads: dict[tuple[str, int, int, int], Memory] = {}

    def of(self, tile: HbmTile) -> Memory:
        """The record of the tensor and head that `tile` is a part of."""
        key = (tile.tensor, tile.batch, tile.head, tile.split)
        if key not in self._heads:
            self._heads[key] = Memory(f"{tile.tensor} of batch {tile.batch}, head {tile.head}")
        return self._heads[key]

    @property
    def order_matters(self) -> set[str]:
        """Tensors to which CTAs have added in an order that depends on time."""
        return {tensor for (tensor, *_), memory in self._heads.items() if memory.order_matters}
