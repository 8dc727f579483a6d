"""What one SM does with a few work tiles: the measurements that the fast path is built on.

Most work tiles are alike but for their number of KV tiles, and a KV loop repeats itself. A `TileClass` says in what two
work tiles can differ; a probe runs a handful of them, shortened, through the real schedule on one SM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashsim.devices import DeviceSpec
from flashsim.engine import Simulation
from flashsim.errors import SimulationError
from flashsim.machine.costs import Costs
from flashsim.machine.cta import CTA
from flashsim.machine.memory import PrivateMemory
from flashsim.machine.options import Options
from flashsim.machine.sm import SM, UNITS
from flashsim.machine.tiles import Shortened, walk_of
from flashsim.problem import AttentionProblem, KVWalk, num_q_tiles
from flashsim.schedules.base import Kernel


class TileClass(NamedTuple):
    """What decides how long a work tile takes, its memory traffic apart."""

    count: int
    """KV tiles."""
    partial: int
    """How many of them need masking."""
    short_q: bool
    """Its query rows end with the problem's."""
    short_k: bool
    """The first KV tile that it visits ends with the keys."""


@dataclass(frozen=True)
class Trace:
    """What happened on the SM. Times in ticks from the start of the first CTA."""

    asks: tuple[int, ...]
    """When each work tile was asked for; the last one found that there was none left."""
    end: int
    busy: dict[str, int]
    fetched: dict[str, int]
    written: dict[str, int]
    walks: list[list[int]]
    """For each warpgroup, when it started each KV tile."""
    events: int


class Probe:
    """Runs work tiles of given classes on one SM that has its memory for itself."""

    def __init__(self, device: DeviceSpec, clock_mhz: float, kernel: Kernel, problem: AttentionProblem) -> None:
        self.device = device
        self.costs = Costs(device, clock_mhz)
        self.kernel = kernel
        self.problem = problem
        self.events = 0
        self._blocks = num_q_tiles(problem, kernel.BLOCK_M)
        self._traces: dict[Any, Trace] = {}
        self._classes: dict[int, TileClass] = {}

    def class_of(self, m_block: int) -> TileClass:
        """The class of query block `m_block` of every head."""
        if m_block not in self._classes:
            p, k = self.problem, self.kernel
            walk = walk_of(k, p, m_block)
            short_q = (m_block + 1) * k.BLOCK_M > p.seqlen_q
            short_k = (walk.first + 1) * k.BLOCK_N > p.seqlen_k
            self._classes[m_block] = TileClass(walk.count, walk.partial, short_q, short_k)
        return self._classes[m_block]

    def run(self, tiles: Sequence[TileClass], slots: int = 1, extra: tuple[int, int] = (0, 0), offset: int = 0) -> Trace:
        """Run `tiles` one after the other, on `slots` CTAs at a time that start `offset` ticks apart; K and V, and what
        else is loaded, arrive `extra` ticks late.

        Raises SimulationError if the schedule does not come to its end.
        """
        key = (tuple(tiles), slots, extra, offset)
        if key not in self._traces:
            self._traces[key] = self._run(tiles, slots, extra, offset)
        return self._traces[key]

    def _run(self, tiles: Sequence[TileClass], slots: int, extra: tuple[int, int], offset: int) -> Trace:
        k = self.kernel
        sim = Simulation()
        memory = PrivateMemory(sim, self.costs, k.copy == "tma", extra)
        sm = SM(sim, self.costs, memory)
        sm.walks = []
        queue = [self._shortened(tile) for tile in tiles]
        queue.reverse()
        asks: list[int] = []
        running = ends = 0

        def ask() -> Shortened | None:
            asks.append(sim.now)
            return queue.pop() if queue else None

        def start_one() -> None:
            nonlocal running
            running += 1
            if k.grid.launch == "cta":
                one = [queue.pop()]
                asks.append(sim.now)
                CTA(sm, k, self.problem, lambda: one.pop() if one else None, done, Options()).start()
            else:
                CTA(sm, k, self.problem, ask, done, Options()).start()

        def done(_: CTA) -> None:
            nonlocal running, ends
            running -= 1
            ends = sim.now
            if queue:
                start_one()

        for slot in range(min(slots, len(queue))):
            sim.call(slot * offset, start_one)
        sim.run()
        if running or queue:
            raise SimulationError(f"{k.name} stops before its end on one SM; `flashsim check` says where")
        self.events += sim.events
        busy = {name: sm.units[name].busy for name in UNITS}
        return Trace(tuple(asks), ends, busy, memory.fetched, memory.written, sm.walks, sim.events)

    def _shortened(self, tile: TileClass) -> Shortened:
        m_block = self._blocks - 1 if tile.short_q else 0
        last = -(-self.problem.seqlen_k // self.kernel.BLOCK_N) - 1
        first = last if tile.short_k else tile.count - 1
        return Shortened((m_block, 0, 0), KVWalk(first, tile.count, tile.partial))
