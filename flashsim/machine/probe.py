"""What one SM does with a few work tiles: the measurements that the fast path is built on.

Most work tiles are alike but for their number of KV tiles, and a KV loop repeats itself. A `TileClass` says in what two
work tiles can differ; a probe runs a handful of them, shortened, through the real schedule on one SM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

from flashsim.devices import DeviceSpec
from flashsim.engine import Simulation
from flashsim.machine.costs import Costs
from flashsim.machine.cta import CTA, run_to_end
from flashsim.machine.memory import Key, PrivateMemory
from flashsim.machine.options import EVENTS_PER_KV_TILE, Options
from flashsim.machine.sm import SM, UNITS
from flashsim.machine.tiles import Shortened, WorkTile, walk_of
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem, num_q_tiles
from flashsim.schedules.base import Kernel

STREAMED = {"K": 3, "V": 3, "S": 4, "P": 4}
"""Tensors that every KV tile has a part of, and where in the part's key its keys' position is."""
ROOM = 256
"""KV tiles by which a probe's keys are longer than the problem's, so that a loop can be tried at any length."""


class TileClass(NamedTuple):
    """What decides how long a work tile takes, its memory traffic apart."""

    count: int  # type: ignore[assignment] # of KV tiles, not tuple.count
    partial: int
    """How many of the first ones need masking."""
    short_q: bool
    """Its query rows end with the problem's."""
    short_k: bool
    """The first KV tile that it visits ends with the keys."""
    partial_end: int = 0
    """How many of the last ones need masking, too."""


class What(NamedTuple):
    """Something that moves between HBM and the SM."""

    tensor: str
    stored: bool


class Late(NamedTuple):
    """One thing that a probe lets come late: what, of which KV tile of which work tile, by how many ticks."""

    what: What
    tile: int
    item: int
    by: int


@dataclass(frozen=True)
class Trace:
    """What happened on the SM. Times in ticks from the start of the first CTA."""

    asks: tuple[int, ...]
    """When each work tile was asked for; of a CTA that takes many, the last one found that there was none left."""
    end: int
    busy: dict[str, int]
    moves: list[dict[What, dict[int, int]]]
    """For each work tile: when the part of each of its KV tiles moved; 0 stands for all that moves once."""
    walks: list[list[int]]
    """For each warpgroup, when it started each KV tile."""


class Probe:
    """Runs work tiles of given classes on one SM that has its memory for itself."""

    def __init__(self, device: DeviceSpec, clock_mhz: float, kernel: Kernel, problem: AttentionProblem) -> None:
        self.device = device
        self.costs = Costs(device, clock_mhz)
        self.miss = PrivateMemory(Simulation(), self.costs, kernel.copy == "tma").miss
        self.kernel = kernel
        self.problem = problem
        self.events = 0
        # A work tile of a probe says itself what it visits, and what of that needs masking.
        self._long = replace(problem, seqlen_k=problem.seqlen_k + ROOM * kernel.BLOCK_N, mask="full")
        self._blocks = num_q_tiles(problem, kernel.BLOCK_M)
        self._traces: dict[Any, Trace] = {}
        self._walks: dict[tuple[int, int], KVWalk] = {}
        self._classes: dict[tuple[int, int], TileClass] = {}

    def walk_at(self, m_block: int, batch: int) -> KVWalk:
        """The KV tiles of query block `m_block` of every head of a batch entry."""
        key = (m_block, batch if self.problem.mask_rule.by_batch else 0)
        if key not in self._walks:
            self._walks[key] = walk_of(self.kernel, self.problem, m_block, batch)
        return self._walks[key]

    def class_of(self, m_block: int, batch: int) -> TileClass:
        """The class of query block `m_block` of every head of a batch entry."""
        key = (m_block, batch if self.problem.mask_rule.by_batch else 0)
        if key not in self._classes:
            p, k = self.problem, self.kernel
            walk = self.walk_at(m_block, batch)
            short_q = (m_block + 1) * k.BLOCK_M > p.seqlen_q
            short_k = (walk.first + 1) * k.BLOCK_N > p.seqlen_k
            self._classes[key] = TileClass(walk.count, walk.partial, short_q, short_k, walk.partial_end)
        return self._classes[key]

    def all_classes(self) -> Iterator[TileClass]:
        """Of each query block of one head of each batch entry."""
        entries = self.problem.batch if self.problem.mask_rule.by_batch else 1
        for batch in range(entries):
            for m_block in range(self._blocks):
                yield self.class_of(m_block, batch)

    @property
    def kv_tiles(self) -> int:
        """KV tiles of the whole grid."""
        entries = 1 if self.problem.mask_rule.by_batch else self.problem.batch
        return sum(tile.count for tile in self.all_classes()) * self.problem.heads_q * entries

    @property
    def typical(self) -> TileClass:
        """The longest class of the kind that has most KV tiles."""
        total: Counter[TileClass] = Counter()
        for tile in self.all_classes():
            total[tile._replace(count=0)] += tile.count
        (kind, _), *_ = total.most_common(1)
        return max(tile for tile in self._classes.values() if tile._replace(count=0) == kind)

    @property
    def tensors(self) -> set[str]:
        """What a work tile loads or stores."""
        tile = self.typical
        trace = self.run([tile._replace(count=min(tile.count, 2), partial=min(tile.partial, 2), partial_end=0)])
        return {what.tensor for what in trace.moves[0]}

    def work_tile(self, tile: TileClass) -> WorkTile:
        """A work tile of this class."""
        m_block = self._blocks - 1 if tile.short_q else 0
        first = -(-self.problem.seqlen_k // self.kernel.BLOCK_N) - 1 if tile.short_k else tile.count - 1
        return WorkTile(self.problem, self.kernel, Shortened((m_block, 0, 0), _walk(tile, first)), 0, 0)

    def run(
        self,
        tiles: Sequence[TileClass],
        slots: int = 1,
        offset: int = 0,
        late: Late | None = None,
        seed: int | None = None,
    ) -> Trace:
        """Run `tiles` one after the other, on `slots` CTAs at a time that start `offset` ticks apart.

        Raises Deadlock if the schedule does not come to its end.
        """
        key = (tuple(tiles), slots, offset, late, seed)
        if key not in self._traces:
            self._traces[key] = self._run(tiles, slots, offset, late, seed)
        return self._traces[key]

    def _run(self, tiles: Sequence[TileClass], slots: int, offset: int, late: Late | None, seed: int | None) -> Trace:
        k = self.kernel
        sim = Simulation()
        todo = [self._shortened(tile, number) for number, tile in enumerate(tiles)]
        memory = _WatchedMemory(sim, self.costs, k, [tile.walk.first for tile in todo], late, seed)
        sm = SM(sim, self.costs, memory)
        sm.walks = []
        todo.reverse()
        asks: list[int] = []
        running: list[CTA] = []
        end = 0

        def ask() -> Shortened | None:
            asks.append(sim.now)
            return todo.pop() if todo else None

        def start_one() -> None:
            one = [ask()] if k.grid.launch == "cta" else []
            tiles = (lambda: one.pop() if one else None) if k.grid.launch == "cta" else ask
            running.append(CTA(sm, k, self._long, tiles, done, Options()))
            running[-1].start()

        def done(cta: CTA) -> None:
            nonlocal end
            running.remove(cta)
            end = sim.now
            if todo:
                start_one()

        for slot in range(min(slots, len(todo))):
            sim.call(slot * offset, start_one)
        run_to_end(sim, running, EVENTS_PER_KV_TILE * sum(1 + tile.count for tile in tiles), watched=False)
        self.events += sim.events
        busy = {name: sm.units[name].busy for name in UNITS}
        return Trace(tuple(asks), end, busy, memory.moves, sm.walks)

    def _shortened(self, tile: TileClass, number: int) -> Shortened:
        """Work tile `number` of a probe, which lies in a batch entry of its own."""
        m_block = self._blocks - 1 if tile.short_q else 0
        last = -(-self._long.seqlen_k // self.kernel.BLOCK_N) - 1
        first = last if tile.short_k else tile.count - 1
        return Shortened((m_block, 0, number), _walk(tile, first))


def _walk(tile: TileClass, first: int) -> KVWalk:
    """A walk of this class over blocks that follow each other, from `first` down."""
    return KVWalk(range(first, first - tile.count, -1), tile.partial, tile.partial_end)


class _WatchedMemory(PrivateMemory):
    """Notes what moves when, and lets one thing come late."""

    def __init__(
        self, sim: Simulation, costs: Costs, kernel: Kernel, first: list[int], late: Late | None, seed: int | None
    ) -> None:
        """`first` has each work tile's first block of keys."""
        super().__init__(sim, costs, kernel.copy == "tma")
        self._width = kernel.BLOCK_N
        self._first = first
        self._late = late
        self._random = None if seed is None else Random(seed)
        self._spread = costs.ns(costs.device.memory.jitter_ns)
        self.moves: list[dict[What, dict[int, int]]] = [{} for _ in first]

    def fetch(self, key: Key, size_byte: int, sharers: int) -> int:
        spread = self._random.randrange(self._spread + 1) if self._random else 0
        return super().fetch(key, size_byte, sharers) + self._note(key, stored=False) + spread

    def write(self, key: Key, size_byte: int) -> int:
        return super().write(key, size_byte) + self._note(key, stored=True)

    def _note(self, key: Key, stored: bool) -> int:
        """By how many ticks this is to be late."""
        what, tile = What(key[0], stored), key[1]
        axis = STREAMED.get(what.tensor)
        item = 0 if axis is None else self._first[tile] - int(key[axis]) // self._width
        self.moves[tile].setdefault(what, {}).setdefault(item, self.sim.now)
        late = self._late
        return late.by if late and (late.what, late.tile, late.item) == (what, tile, item) else 0
