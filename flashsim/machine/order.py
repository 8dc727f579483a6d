"""The order in which CTAs add to what they share: a counter in global memory for each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from flashsim.engine import Semaphore, SemaphoreWait, Simulation
from flashsim.machine.tiles import Coordinates, WorkTile, walk_of

if TYPE_CHECKING:
    from flashsim.machine.cta import CTA

Counter = tuple[str, int, int, int]
"""Name, batch, head, and block of the inner loop."""


class Counters(Protocol):
    """The counters of one launch."""

    def of(self, name: str, tile: WorkTile, j: int, each: int) -> tuple[Semaphore, int]:
        """The counter of the block that tile j of the inner loop is, and how many work tiles come before this one."""

    def passed(self, name: str, tile: WorkTile, j: int) -> None:
        """The work tile lets the next one go on; called when that takes effect."""


class SharedCounters:
    """Those of a launch in which every CTA is simulated."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self._counters: dict[Counter, Semaphore] = {}
        self._places: dict[tuple[int, int, int], int] = {}

    def of(self, name: str, tile: WorkTile, j: int, each: int) -> tuple[Semaphore, int]:
        where, block = tile.where, tile.block(j)
        key = (name, where.batch, where.head, block)
        if key not in self._counters:
            self._counters[key] = Semaphore(self.sim, f"{name} of batch {where.batch}, head {where.head}", each)
        place = (where.batch if tile.problem.mask_rule.by_batch else 0, where.block, block)
        if place not in self._places:
            before = (walk_of(tile.kernel, tile.problem, Coordinates(n, 0, where.batch)) for n in range(where.block))
            self._places[place] = sum(block in walk.blocks for walk in before)
        return self._counters[key], self._places[place]

    def passed(self, name: str, tile: WorkTile, j: int) -> None:
        pass


class Order:
    """Work tiles of one head that share a block of the inner loop take turns, in the order of their own blocks."""

    def __init__(self, cta: CTA, counters: Counters, name: str, warpgroups: int) -> None:
        self.cta = cta
        self.name = name
        self._counters = counters
        self._warpgroups = warpgroups

    def turn(self, tile: WorkTile, j: int) -> SemaphoreWait:
        """Until the work tiles before this one have passed on. Timing assumption: who waits polls L2."""
        semaphore, before = self._counters.of(self.name, tile, j, self._warpgroups)
        return semaphore.after(before, self.cta.sm.memory.latency)

    def pass_on(self, tile: WorkTile, j: int) -> None:
        semaphore, _ = self._counters.of(self.name, tile, j, self._warpgroups)

        def send(clock: object) -> None:
            self._counters.passed(self.name, tile, j)
            semaphore.arrive(clock)  # type: ignore[arg-type]

        self.cta.speaker.signal(send)
