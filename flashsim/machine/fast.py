"""The fast path: every SM and every work tile of a kernel, but not every operation.

The grid, the L2 and the HBM are those of the full simulation; what an SM does between two requests is not simulated again
but taken from a few probes of one SM (`pace`). A work tile is a row of chunks of KV tiles: each asks for its K and V, and
the SM goes on when it has computed, unless data that it needs by then is late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.engine import Simulation, Steps
from flashsim.machine.feasibility import fit
from flashsim.machine.gpu import KernelRun
from flashsim.machine.grid import tile_at, tile_count
from flashsim.machine.memory import SHARED_TENSORS, PrivateMemory, SharedMemory
from flashsim.machine.options import Options
from flashsim.machine.pace import Pace
from flashsim.machine.probe import Probe, TileClass
from flashsim.machine.sm import UNITS
from flashsim.machine.tiles import Coordinates, HbmTile, WorkTile
from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel
from flashsim.units import ticks

MAX_CHUNKS = 40_000
"""KV tiles are taken together, as many as it needs to have no more chunks than this."""

CP_ASYNC_CLK = 32
"""Between the requests for two tiles by cp.async: eight instructions a thread for 16 KB."""


@dataclass
class _Sm:
    resident: int = 0
    since: int = 0
    active: int = 0


@dataclass
class FastSimulation:
    """One kernel on a device. Takes and gives what `FullSimulation` does.

    Timing assumption: CTAs that share an SM advance at the rate at which CTAs of their own kind share it.
    """

    device: DeviceSpec
    clock_mhz: float
    kernel: Kernel
    problem: AttentionProblem
    options: Options = field(default_factory=Options)

    def run(self) -> KernelRun:
        """Simulate. Raises Infeasible if the kernel does not fit."""
        k, p = self.kernel, self.problem
        per_sm = fit(k, p, self.device).ctas_per_sm
        self._probe = Probe(self.device, self.clock_mhz, k, p)
        self._pace = Pace(self._probe)
        costs = self._probe.costs
        sim = self._sim = Simulation()
        tma = k.copy == "tma"
        shared = SharedMemory(sim, costs, tma, self.options.seed)
        self._memory = PrivateMemory(sim, costs, tma) if self.options.private_memory else shared
        self._where = tile_at(k, p)
        self._tiles = tile_count(k, p)
        self._next = 0
        self._done: dict[TileClass, int] = {}
        self._learn()
        count = self.device.sm.count
        sms = [_Sm() for _ in range(count)]
        slots = count * per_sm
        launch = costs.ns(self.device.launch.kernel_us * 1000)
        interval = costs.ns(self.device.launch.cta_interval_ns)
        self._end = launch
        for position in range(min(slots, self._tiles)):
            host, at = sms[position % count], launch + position * interval
            if k.grid.launch == "cta":
                sim.start(self._one_after_the_other(host, at))
            else:
                sim.start(self._persistent(host, at, self._source(position, slots)))
        sim.run()
        busy = dict.fromkeys(UNITS, 0)
        for tile, times in self._done.items():
            for unit, work in self._pace.busy(tile).items():
                busy[unit] += work * times
        busy |= {"l2": shared.l2.busy, "hbm": shared.hbm.busy}
        return KernelRun(
            ticks=self._end,
            launch=launch,
            active=sum(sm.active for sm in sms),
            busy=busy,
            read_byte=shared.read_byte,
            written_byte=shared.written_byte,
            events=sim.events + self._probe.events,
            ctas_per_sm=per_sm,
        )

    def _learn(self) -> None:
        """How far ahead of its use a KV tile is asked for, and which tensors a work tile moves how often."""
        blocks = range(-(-self.problem.seqlen_q // self.kernel.BLOCK_M))
        classes = {self._probe.class_of(m) for m in blocks}
        longest = max(classes)
        total = sum(self._probe.class_of(m).count for m in blocks) * self.problem.heads_q * self.problem.batch
        self._chunk = 1 if self.options.private_memory else max(1, total // MAX_CHUNKS)
        loop = self._pace.loop(longest)
        far, further = 4 * loop, 8 * loop
        late, later = self._pace.loop(longest, round(far)), self._pace.loop(longest, round(further))
        # In a loop that waits for memory, `depth` requests are on their way at a time: time = (latency + rest) / depth.
        depth = (further - far) / (later - late)
        slack = max(0.0, far - depth * (late - loop))
        self._issue = ticks(self.device.tma.issue_clk if self.kernel.copy == "tma" and self.device.tma else CP_ASYNC_CLK)
        persistent = self.kernel.grid.launch != "cta"
        self._patience = self._pace.patience(longest, round(far)) if persistent else 0
        deep = max(1, round(depth) // self._chunk)
        self._depth = deep
        self._from_arrival = round((loop if deep == 1 else deep * self._chunk * loop) - slack)
        trace = self._probe.run([self._pace.fold(longest)[0]])
        self._loads = {tensor: callable(getattr(WorkTile, tensor)) for tensor in trace.fetched}
        self._stores = {tensor: callable(getattr(WorkTile, tensor)) for tensor in trace.written}
        """Tensor to: once for each KV tile (or once for the work tile)."""

    def _source(self, position: int, slots: int) -> Iterator[Coordinates]:
        if self.kernel.grid.launch == "static":
            return (self._where(i) for i in range(position, self._tiles, slots))
        return self._counter()

    def _counter(self) -> Iterator[Coordinates]:
        while self._next < self._tiles:
            self._next += 1
            yield self._where(self._next - 1)

    def _persistent(self, host: _Sm, at: int, source: Iterator[Coordinates]) -> Steps:
        """The life of a CTA that takes tile after tile."""
        sim, pace = self._sim, self._pace
        yield sim.at(at)
        begin = sim.now
        yield sim.at(begin + pace.first_ask())
        before: tuple[TileClass, ...] = ()
        tail = 0
        ready: deque[int] = deque(maxlen=self._depth)
        for where in source:
            tile = self._probe.class_of(where[0])
            tail = pace.tail(before, tile)
            yield from self._work(where, tile, lambda b=before, t=tile: pace.step(b, t), ready, not before)
            before = (*before, tile)[-3:]
        yield sim.at(sim.now + tail)
        host.active += sim.now - begin
        self._end = max(self._end, sim.now)

    def _one_after_the_other(self, host: _Sm, at: int) -> Steps:
        """The CTAs that follow each other in one slot of an SM, each with one tile."""
        sim, pace = self._sim, self._pace
        yield sim.at(at)
        if host.resident == 0:
            host.since = sim.now
        host.resident += 1
        first = True
        for where in self._counter():
            tile = self._probe.class_of(where[0])

            def duration(tile: TileClass = tile, first: bool = first) -> int:
                return pace.share(tile, host.resident, first)

            yield from self._work(where, tile, duration, deque(maxlen=self._depth), True)
            first = False
        host.resident -= 1
        if host.resident == 0:
            host.active += sim.now - host.since
        self._end = max(self._end, sim.now)

    def _work(self, where: Coordinates, kind: TileClass, duration: Any, ready: deque[int], first: bool) -> Steps:
        """One work tile, perhaps the first of its CTA. `duration()` is its time as things stand; `ready` has when the last
        chunks' data arrive."""
        sim, memory, k = self._sim, self._memory, self.kernel
        self._done[kind] = self._done.get(kind, 0) + 1
        if self.options.private_memory:
            yield sim.at(sim.now + duration())
            return
        assert isinstance(memory, SharedMemory)
        tile = WorkTile(self.problem, k, where, 0, 0)
        chunks = self._chunks(tile)
        for number, (keys, size) in enumerate(chunks):
            arrivals: list[int] = []
            awaited, begin = 0, sim.now
            for tensor, each in self._loads.items():
                if first and arrivals and number == 0:
                    yield sim.at(sim.now + self._issue)  # all SMs ask for their first tile before any asks for its next
                if each:
                    sharers = k.cluster if tensor in SHARED_TENSORS else 1
                    expected = 0 if tensor in SHARED_TENSORS else memory.miss  # by the probes
                    arrivals.append(memory.fetch(keys[tensor], size[tensor], sharers) - expected)
                elif number == 0:
                    whole: HbmTile = getattr(tile, tensor)
                    awaited = max(awaited, memory.fetch(whole.key, whole.size_byte, 1))
            arrival = max(arrivals, default=0)
            late = 0
            if number == 0:
                # The probes know that what only this work tile reads is never in L2; it counts by how much later it comes.
                # At the start of a CTA nothing can be done before the first tiles are there.
                late = (max(awaited, *arrivals[:1]) if first else awaited - self._patience) - begin - memory.miss
            for tensor, each in self._stores.items():
                if each:
                    late = max(late, memory.write(keys[tensor], size[tensor]) - begin)
            now = duration()
            share = now * (number + 1) // len(chunks) - now * number // len(chunks)
            ready.append(arrival)
            until = begin + share + max(0, late)
            if len(ready) == self._depth:
                until = max(until, ready[0] + self._from_arrival)
            yield sim.at(until)
        if not chunks:
            yield sim.at(sim.now + duration())
        for tensor, each in self._stores.items():
            if not each:
                out: HbmTile = getattr(tile, tensor)
                memory.write(out.key, out.size_byte)

    def _chunks(self, tile: WorkTile) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """For each chunk of KV tiles, by tensor: a key for the L2, and bytes."""
        moved = [tensor for each in (self._loads, self._stores) for tensor, per_kv_tile in each.items() if per_kv_tile]
        result = []
        j = tile.first
        while j <= tile.last:
            block = tile.block(j)
            lowest = block // self._chunk * self._chunk
            number = block - lowest + 1
            keys, sizes = {}, {}
            for tensor in moved:
                one: HbmTile = getattr(tile, tensor)(j)
                keys[tensor] = (tensor, one.batch, one.head, 0 if tensor in SHARED_TENSORS else tile.m_block, lowest)
                sizes[tensor] = one.size_byte + (number - 1) * one.full_byte
            result.append((keys, sizes))
            j += number
        return result
