"""What one SM does with a few work tiles: the measurements that the fast path is built on.

Most work tiles are alike but for their number of KV tiles, and a KV loop repeats itself. A `TileClass` says in what two
work tiles can differ; a probe runs a handful of them, shortened, through the real schedule on one SM.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

from flashsim.devices import DeviceSpec
from flashsim.engine import Semaphore, Simulation
from flashsim.machine.costs import Costs
from flashsim.machine.cta import CTA, run_to_end
from flashsim.machine.grid import grid_heads
from flashsim.machine.memory import Key, PrivateMemory
from flashsim.machine.options import EVENTS_PER_KV_TILE, Options
from flashsim.machine.sm import SM, UNITS
from flashsim.machine.tiles import Coordinates, Shortened, WorkTile, outer_blocks, walk_of
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem, num_k_tiles, num_q_tiles
from flashsim.schedules.base import Kernel

ROW, COLUMN = 3, 4
"""Where in a tile's key its position is."""
ROOM = 256
"""Tiles by which a probe's inner loop can be longer than the problem's, so that it can be tried at any length."""


class TileClass(NamedTuple):
    """What decides how long a work tile takes, its memory traffic apart: said of a block of queries, which visits KV
    tiles; a block of keys visits Q tiles."""

    count: int  # type: ignore[assignment] # of KV tiles, not tuple.count
    partial: int
    """How many of the first ones need masking."""
    short: bool
    """Its queries end with the problem's."""
    short_first: bool
    """The first KV tile that it visits ends with the keys."""
    partial_end: int = 0
    """How many of the last ones need masking, too."""


class What(NamedTuple):
    """Something that moves between HBM and the SM."""

    tensor: str
    how: str
    """`fetch`, `write` or `add`: what the memory is asked for. Or `turn` and `pass`: a work tile waits for the one
    before it in the same head, and lets the next one go on."""

    @property
    def moves(self) -> bool:
        return self.how not in ("turn", "pass")

    @property
    def is_load(self) -> bool:
        return self.how == "fetch"


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
    """Ticks by unit, and `flop`: those of all products."""
    moves: list[dict[What, dict[int, int]]]
    """For each work tile: when the part of each of its KV tiles moved; 0 stands for all that moves once."""
    once_byte: list[Counter[What]]
    """For each work tile: bytes of what moves once."""
    walks: list[list[int]]
    """For each warpgroup, when it started each KV tile."""
    events: int


class _Known:
    """Traces of built-in kernels, which depend on nothing that a process has done before: a scenario asks again and
    again for the same kernel at other lengths."""

    MAX = 5_000

    def __init__(self) -> None:
        self._traces: OrderedDict[Any, Trace] = OrderedDict()

    def get(self, key: Any, run: Callable[[], Trace]) -> Trace:
        """The trace known by `key`, or that which `run` gives."""
        if key not in self._traces:
            self._traces[key] = run()
            if len(self._traces) > self.MAX:
                self._traces.popitem(last=False)
        return self._traces[key]


KNOWN = _Known()


class Probe:
    """Runs work tiles of given classes on one SM that has its memory for itself."""

    def __init__(self, device: DeviceSpec, clock_mhz: float, kernel: Kernel, problem: AttentionProblem) -> None:
        self.device = device
        self.costs = Costs(device, clock_mhz)
        self.miss = PrivateMemory(Simulation(), self.costs, kernel.copy == "tma", kernel.is_common).miss
        self.kernel = kernel
        self.problem = problem
        self.events = 0
        # A work tile of a probe says itself what it visits, and what of that needs masking.
        seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
        if kernel.grid.over == "queries":
            self._has_whole_blocks = seqlen_q >= kernel.BLOCK_M
            seqlen_k += ROOM * kernel.BLOCK_N
        else:
            self._has_whole_blocks = seqlen_k >= kernel.BLOCK_N
            seqlen_q += ROOM * kernel.BLOCK_M
        self._long = replace(problem, seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask="full")
        self._name = self._named()
        self._blocks = outer_blocks(kernel, problem)
        asks_the_mask = kernel.walk == "mask" or (kernel.walk == "all" and kernel.masks)
        self._by_batch = asks_the_mask and problem.mask_rule.by_batch
        self._traces: dict[Any, Trace] = {}
        self._walks: dict[tuple[int, int, int], KVWalk] = {}
        self._classes: dict[tuple[int, int, int], TileClass] = {}

    def _alike(self, where: Coordinates) -> tuple[int, int, int]:
        """Block, batch entry and split of the first of the work tiles that visit the same tiles as the one there."""
        return where.block, where.batch if self._by_batch else 0, where.split

    def walk_at(self, where: Coordinates) -> KVWalk:
        """The tiles that the work tile there visits."""
        key = self._alike(where)
        if key not in self._walks:
            self._walks[key] = walk_of(self.kernel, self.problem, where)
        return self._walks[key]

    def class_of(self, where: Coordinates) -> TileClass:
        """The class of the work tile there."""
        key = self._alike(where)
        if key not in self._classes:
            p, k = self.problem, self.kernel
            walk = self.walk_at(where)
            of_queries, of_keys = (p.seqlen_q, k.BLOCK_M), (p.seqlen_k, k.BLOCK_N)
            outer, inner = (of_queries, of_keys) if k.grid.over == "queries" else (of_keys, of_queries)
            short, short_first = (
                (block + 1) * width > length for block, (length, width) in ((where.block, outer), (walk.first, inner))
            )
            self._classes[key] = TileClass(walk.count, walk.partial, short, short_first, walk.partial_end)
        return self._classes[key]

    def all_classes(self) -> Iterator[TileClass]:
        """Of each work tile of one head of each batch entry."""
        for batch in range(self.problem.batch if self._by_batch else 1):
            for block in range(self._blocks):
                for split in range(self.kernel.grid.splits or 1):
                    yield self.class_of(Coordinates(block, 0, batch, split))

    @property
    def kv_tiles(self) -> int:
        """Tiles that the work tiles of the whole grid visit."""
        entries = 1 if self._by_batch else self.problem.batch
        return sum(tile.count for tile in self.all_classes()) * grid_heads(self.kernel, self.problem) * entries

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
        """What a work tile loads, stores or adds to."""
        tile = self.typical
        trace = self.run([tile._replace(count=min(tile.count, 2), partial=min(tile.partial, 2), partial_end=0)])
        return {what.tensor for what in trace.moves[0] if what.moves}

    def work_tile(self, tile: TileClass) -> WorkTile:
        """A work tile of this class."""
        where = Coordinates(self._blocks - 1 if tile.short else 0, 0, 0)
        first = self._inner_blocks(self.problem) - 1 if tile.short_first else tile.count - 1
        return WorkTile(self.problem, self.kernel, Shortened(where, _walk(tile, first)), 0, 0)

    def _inner_blocks(self, problem: AttentionProblem) -> int:
        """Blocks of one head that the inner loop is over."""
        if self.kernel.grid.over == "queries":
            return num_k_tiles(problem, self.kernel.BLOCK_N)
        return num_q_tiles(problem, self.kernel.BLOCK_M)

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

            def run() -> Trace:
                return self._run(tiles, slots, offset, late, seed)

            # Where a work tile ends with a tensor, its bytes depend on the lengths.
            whole = self._has_whole_blocks and not any(tile.short or tile.short_first for tile in tiles)
            self._traces[key] = KNOWN.get((self._name, key), run) if self._name and whole else run()
            self.events += self._traces[key].events
        return self._traces[key]

    def _named(self) -> Any:
        """What decides the traces of a built-in kernel; None for a user's, whose text may ask for anything."""
        k, p = self.kernel, self.problem
        programs: list[Any] = []
        for role in k.roles:
            for function in (role.program, role.registers, k.shared):
                bare = function.func if isinstance(function, partial) else function
                given = (function.args, tuple(function.keywords.items())) if isinstance(function, partial) else ()
                owner = getattr(bare, "__self__", None)
                texts = (bare, *_classes_of(type(owner))) if owner is not None else (bare,)  # type: ignore[arg-type]
                if not all(text is None or text.__module__.startswith("flashsim.schedules.") for text in texts):
                    return None
                programs += [getattr(bare, "__qualname__", ""), *texts[1:], _state_of(owner), given]
            programs.append((role.name, role.count, role.warps))
        kernel = (k.name, k.grid, k.BLOCK_M, k.BLOCK_N, k.widths(p), k.mma, k.copy, k.cluster, k.overhead_instructions)
        more = (k.walk, k.masks, k.kv_dtype, tuple(k.workspace.items()))
        sizes = (p.head_dim, p.head_dim_v, p.dtype, p.dropout, p.heads_per_kv)
        return (repr(self.device), self.costs.clock_mhz, tuple(programs), kernel, more, sizes)

    def _run(self, tiles: Sequence[TileClass], slots: int, offset: int, late: Late | None, seed: int | None) -> Trace:
        k = self.kernel
        sim = Simulation()
        todo = [self._shortened(tile, number) for number, tile in enumerate(tiles)]
        memory = _WatchedMemory(sim, self.costs, k, [tile.walk.first for tile in todo], late, seed)
        counters = _WatchedCounters(sim, memory)
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
            running.append(CTA(sm, k, self._long, tiles, done, Options(counters=counters)))
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
        busy = {name: sm.units[name].busy for name in UNITS} | {"flop": sm.flop}
        return Trace(tuple(asks), end, busy, memory.moves, memory.once_byte, sm.walks, sim.events)

    def _shortened(self, tile: TileClass, number: int) -> Shortened:
        """Work tile `number` of a probe, which lies in a batch entry of its own."""
        where = Coordinates(self._blocks - 1 if tile.short else 0, 0, number)
        first = self._inner_blocks(self._long) - 1 if tile.short_first else tile.count - 1
        return Shortened(where, _walk(tile, first))


@cache
def _classes_of(kind: type) -> tuple[type, ...]:
    """`kind`, and the classes that it has as attributes: its methods may call theirs."""
    parts = [getattr(kind, name) for name in dir(kind) if not name.startswith("__")]
    return (kind, *(part for part in parts if isinstance(part, type)))


def _state_of(owner: object) -> str:
    """What an object of one class can differ in from others."""
    return repr(owner) if is_dataclass(owner) else repr(getattr(owner, "__dict__", None))


def _walk(tile: TileClass, first: int) -> KVWalk:
    """A walk of this class over blocks that follow each other, from `first` down."""
    return KVWalk(range(first, first - tile.count, -1), tile.partial, tile.partial_end)


class _WatchedCounters:
    """For a work tile that has nobody before it; notes when it has its first turn, and when it passes on."""

    def __init__(self, sim: Simulation, memory: _WatchedMemory) -> None:
        self._sim = sim
        self._memory = memory
        self._passed: set[tuple[str, int]] = set()

    def of(self, name: str, tile: WorkTile, j: int, each: int) -> tuple[Semaphore, int]:
        self._memory.note_turn(name, tile.where.batch, "turn")
        return Semaphore(self._sim, name, each), 0

    def passed(self, name: str, tile: WorkTile, j: int) -> None:
        self._memory.note_turn(name, tile.where.batch, "pass")


class _WatchedMemory(PrivateMemory):
    """Notes what moves when, and lets one thing come late."""

    def __init__(
        self, sim: Simulation, costs: Costs, kernel: Kernel, first: list[int], late: Late | None, seed: int | None
    ) -> None:
        """`first` has each work tile's first block of keys."""
        super().__init__(sim, costs, kernel.copy == "tma", kernel.is_common)
        self._kernel = kernel
        self._first = first
        self._late = late
        self._random = None if seed is None else Random(seed)
        self._spread = costs.ns(costs.device.memory.jitter_ns)
        self.moves: list[dict[What, dict[int, int]]] = [{} for _ in first]
        self.once_byte = [Counter[What]() for _ in first]

    def fetch(self, key: Key, size_byte: int, sharers: int) -> int:
        spread = self._random.randrange(self._spread + 1) if self._random else 0
        return super().fetch(key, size_byte, sharers) + self._note(key, "fetch", size_byte) + spread

    def write(self, key: Key, size_byte: int) -> int:
        return super().write(key, size_byte) + self._note(key, "write", size_byte)

    def add(self, key: Key, size_byte: int) -> int:
        return super().add(key, size_byte) + self._note(key, "add", size_byte)

    def note_turn(self, name: str, tile: int, how: str) -> None:
        """Of one work tile, the first of each."""
        self.moves[tile].setdefault(What(name, how), {}).setdefault(0, self.sim.now)

    def _note(self, key: Key, how: str, size_byte: int) -> int:
        """By how many ticks this is to be late."""
        what, tile, item = What(key[0], how), key[1], 0
        k = self._kernel
        if k.streams(what.tensor):
            rows = k.tensor(what.tensor).rows
            width = k.BLOCK_M if rows == "queries" else k.BLOCK_N
            # Of scores in a block of queries, what streams is the other axis.
            row, column = int(key[ROW]), int(key[COLUMN])
            block = column // k.BLOCK_N if rows == k.grid.over else row // width
            item = self._first[tile] - block
        else:
            self.once_byte[tile][what] += size_byte
        self.moves[tile].setdefault(what, {}).setdefault(item, self.sim.now)
        late = self._late
        return late.by if late and (late.what, late.tile, late.item) == (what, tile, item) else 0
